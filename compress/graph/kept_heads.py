"""Skeletons of models whose heads were removed, where transformers' config cannot say so (:data:`KEPT_HEADS`).

transformers takes a head's size from the number of heads, so the checkpoint keeps zeros in their place; a graph needs
them no more than their weights. torch modules get the shapes that the family describes, and mobius' config the sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.contracts import KEPT_HEADS, PrunableFamily, Structure
from compress.families import load_family
from compress.source.files import MAX_CONFIG_BYTES, read_json_object


def narrow(model: Any, structure: Structure) -> None:
    """Cut a transformers model's linears to the shapes that are planned: what lies beyond is zeros.

    Attention of the BERT shape finds the number of its heads in the width of its inputs.
    """
    import torch

    for linear in structure.linears:
        parts = len(linear.graph_weights)
        if linear.role not in ("qkv", "attention_output"):
            continue
        for name in linear.graph_weights:
            module = model.get_submodule(name.rpartition(".")[0])
            rows, columns = linear.out_features // parts, linear.in_features
            if module.weight.shape == (rows, columns):
                continue
            module.weight = torch.nn.Parameter(module.weight.detach()[:rows, :columns].clone(), requires_grad=False)
            module.bias = torch.nn.Parameter(module.bias.detach()[:rows].clone(), requires_grad=False)
            module.out_features, module.in_features = rows, columns


def removed(config: Mapping[str, Any]) -> bool:
    """Return whether a config says that heads are left as zeros."""
    return config.get(KEPT_HEADS) is not None


def described(config: Mapping[str, Any], architecture: str) -> Structure:
    """Return the structure of a config for an architecture, without a checkpoint."""
    whole = {**config, "architectures": [architecture]}
    return load_family(whole).describe(whole, {})


def resized_config(directory: Path, output: Path) -> Path:
    """Return a directory with a ``config.json`` that mobius reads: fewer heads of the same size.

    ``directory`` itself where no heads are left as zeros; else it is written into ``output``.
    """
    config = read_json_object(directory / "config.json", MAX_CONFIG_BYTES)
    if not removed(config):
        return directory
    family = load_family(config)
    assert isinstance(family, PrunableFamily)
    structure = family.describe(config, {})
    changed = {key: value for key, value in config.items() if key != KEPT_HEADS}
    changed |= {family.sizes.heads: structure.heads, "head_dim": structure.head_dim}
    (output / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    return output
