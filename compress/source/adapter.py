"""A PEFT LoRA adapter seen through its base model: rows come out merged, ``W + scaling * B A``.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv:2106.09685); the file format and the
meaning of every key are those of PEFT (``peft.tuners.lora``), whose ``merge_and_unload`` this equals.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from compress.contracts import FloatArray, SourceFile, TensorInfo
from compress.errors import SourceError, UnsupportedModelError
from compress.source.adapter_config import load_adapter_config
from compress.source.base import (
    CONFIG_NAME,
    SIDECAR_NAMES,
    TOKENIZER_NAMES,
    VOCABULARIES,
    BaseCheckpoint,
    OpenCheckpoint,
    find_sidecars,
)
from compress.source.files import contained
from compress.source.safetensors_file import ITEM_BYTES, SafetensorsFile, row_range
from compress.source.sentence_transformers import MODULES_NAME, SENTENCE_NAMES

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
# The product is computed in blocks at fixed multiples of this many rows, so that a row's bits do not depend on which
# rows are asked for together with it.
BLOCK_ROWS = 256

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:(?P<linear>lora_[AB])\.(?P<suffix>weight|bias)|(?P<table>lora_embedding_[AB]))"
)
_WRAPPERS = re.compile(r"\.(?:base_layer|original_module|modules_to_save(?:\.default)?)(?=\.)")
_TABLES = ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in")

_logger = logging.getLogger(__name__)


@dataclass
class _Change:
    """What the adapter does to one base tensor; names are those in the adapter's file.

    ``transposed`` says that the base tensor is stored as ``[in_features, out_features]``.
    """

    replacement: str | None = None
    factors: dict[str, str] = field(default_factory=dict)
    bias: str | None = None
    scaling: float = 1.0
    transposed: bool = False


def merge_adapter(base: OpenCheckpoint, directory: Path) -> OpenCheckpoint:
    """Return ``base`` with the LoRA adapter in ``directory`` merged; closing it closes the base too.

    Raises:
        SourceError: The adapter is missing, pickled, damaged, or does not fit the base.
        UnsupportedModelError: Another method than LoRA, or a variant of LoRA whose merging has no implementation.
    """
    return AdapterCheckpoint(base, directory)


class AdapterCheckpoint(BaseCheckpoint):
    """The view; see :func:`merge_adapter`."""

    def __init__(self, base: OpenCheckpoint, directory: Path) -> None:
        self._base = base
        self._adapter = directory
        _check_directory(directory)
        self._lora = load_adapter_config(directory, ADAPTER_CONFIG_NAME)
        self._note_base_mismatch()
        self._weights = SafetensorsFile(contained(directory, ADAPTER_WEIGHTS_NAME))
        self._changes: dict[str, _Change] = {}
        try:
            if base.has_weights:
                self._match()
            super().__init__(
                reference=base.reference,
                kind=base.kind,
                identifier=f"{base.identifier}+{directory.resolve().name}",
                revision=base.revision,
                config=base.config,
                directory=None,
            )
        except BaseException:
            self._weights.close()
            raise
        self.has_weights = base.has_weights

    # ------------------------------------------------------------------------------------------------ matching

    def _match(self) -> None:
        """Sort the adapter's tensors by the base tensor they change; every one of them has to find its place."""
        for key, info in self._weights.tensors.items():
            if info.dtype not in ITEM_BYTES:
                raise SourceError(f"adapter tensor {key!r} is stored as {info.dtype}", where=ADAPTER_WEIGHTS_NAME)
            name = key.removeprefix(PEFT_PREFIX)
            match = _FACTOR.fullmatch(name)
            if match is None:
                if "lora_" in name:
                    raise UnsupportedModelError(
                        f"adapter tensor {key!r} has no known meaning", where=ADAPTER_WEIGHTS_NAME
                    )
                self._replace(key, _WRAPPERS.sub("", name))
            elif match["suffix"] == "bias":
                self._change(f"{match['module']}.bias", key).bias = key
            else:
                side = (match["linear"] or match["table"])[-1]
                self._change(f"{match['module']}.weight", key).factors[side] = key
        if not self._changes:
            raise SourceError("the adapter holds no tensors", where=ADAPTER_WEIGHTS_NAME)
        for target, change in self._changes.items():
            self._check(target, change)

    def _change(self, name: str, key: str) -> _Change:
        tensors = self._base.tensors()
        # A model saved without its head (GPT-2's own checkpoint) lacks the first part of the names.
        target = next((candidate for candidate in (name, name.partition(".")[2]) if candidate in tensors), None)
        if target is None:
            tied = name.endswith("lm_head.weight")
            raise SourceError(
                f"the adapter does not fit its base: there is no tensor {name!r}",
                where=key,
                hint="the base's head is tied to its embedding, so it cannot be tuned apart: untie it first"
                if tied
                else f"the adapter was made for {self._lora.base_model or 'another model'}",
            )
        if self._is_tied_table(target):
            raise UnsupportedModelError(
                "the adapter changes an embedding that is also the output head; PEFT trains only one of the two uses",
                where=key,
                hint="untie the base's head first (save it with lm_head.weight and tie_word_embeddings false)",
            )
        return self._changes.setdefault(target, _Change())

    def _is_tied_table(self, target: str) -> bool:
        parts = target.split(".")
        table = len(parts) > 1 and parts[-2] in _TABLES and parts[-2] != "wpe"
        return table and not any(name.split(".")[-2:] == ["lm_head", "weight"] for name in self._base.tensors())

    def _replace(self, key: str, name: str) -> None:
        change = self._change(name, key)
        if change.replacement is not None:
            raise SourceError(f"two adapter tensors replace {name!r}", where=key)
        change.replacement = key

    def _check(self, target: str, change: _Change) -> None:
        """Check shapes, and settle scaling and orientation."""
        shape = self._base.tensors()[target].shape
        shapes = {key: info.shape for key, info in self._weights.tensors.items()}
        for key in (change.replacement, change.bias):
            if key is not None and shapes[key] != shape:
                raise self._misfit(target, f"{list(shapes[key])} for {list(shape)}")
        if not change.factors:
            if change.bias is not None:
                module = target.removesuffix(".bias")
                change.scaling = self._lora.scaling(_peft_name(module, change.bias), self._rank_beside(change.bias))
            return
        if set(change.factors) != {"A", "B"}:
            raise SourceError(f"the adapter has only half of the factors of {target!r}", where=ADAPTER_WEIGHTS_NAME)
        a, b = shapes[change.factors["A"]], shapes[change.factors["B"]]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise self._misfit(target, f"factors of shapes {list(a)} and {list(b)}")
        table = "lora_embedding" in change.factors["A"]
        plain, turned = (b[0], a[1]) == shape, (a[1], b[0]) == shape
        if not plain and not turned:
            raise self._misfit(target, f"factors of shapes {list(a)} and {list(b)} for {list(shape)}")
        # Only a square matrix leaves it open; PEFT then relies on the flag, which it sets for GPT-2's Conv1D.
        change.transposed = table or (self._lora.fan_in_fan_out if plain and turned else turned)
        change.scaling = self._lora.scaling(_peft_name(target.removesuffix(".weight"), change.factors["A"]), a[0])

    def _rank_beside(self, bias_key: str) -> int:
        factor = self._weights.tensors.get(bias_key.removesuffix("bias") + "weight")
        if factor is None or len(factor.shape) != 2:
            raise SourceError(f"adapter tensor {bias_key!r} has no factor beside it", where=ADAPTER_WEIGHTS_NAME)
        return factor.shape[1]

    def _misfit(self, target: str, what: str) -> SourceError:
        return SourceError(
            f"the adapter does not fit its base at {target!r}: {what}",
            where=ADAPTER_WEIGHTS_NAME,
            hint=f"the adapter was made for {self._lora.base_model or 'another model'}",
        )

    def _note_base_mismatch(self) -> None:
        told, given = (self._lora.base_model or "").rstrip("/"), self._base.identifier
        if told and told.rpartition("/")[2].lower() != given.rpartition("/")[2].lower():
            _logger.warning("the adapter says that it was made for %s; it is merged into %s", told, given)

    # ------------------------------------------------------------------------------------------------- reading

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every tensor's header by name; merging keeps names and shapes."""
        return self._base.tensors()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> FloatArray:
        """Return rows ``[start, stop)`` along axis 0, merged, as a new C-contiguous float32 array.

        The product is accumulated in float64 and rounded once, with the sum.

        Raises:
            SourceError: Unknown tensor, rows outside it, or a file shorter than its header says.
        """
        change = self._changes.get(name)
        if change is None:
            return self._base.read(name, start, stop)
        start, stop = row_range(self._base.tensors()[name], start, stop, self.identifier)
        if change.replacement is not None:
            rows = self._weights.read(change.replacement, start, stop)
        else:
            rows = self._base.read(name, start, stop)
        if change.bias is not None:
            rows += np.float32(change.scaling) * self._weights.read(change.bias, start, stop)
        if change.factors:
            self._add_product(rows, change, start)
        return rows

    def _add_product(self, rows: FloatArray, change: _Change, start: int) -> None:
        a = self._weights.read(change.factors["A"]).astype(np.float64)
        b = self._weights.read(change.factors["B"]).astype(np.float64)
        left, right = (a.T, b.T) if change.transposed else (b, a)
        stop = start + len(rows)
        for begin in range(start // BLOCK_ROWS * BLOCK_ROWS, stop, BLOCK_ROWS):
            product: npt.NDArray[np.float64] = left[begin : begin + BLOCK_ROWS] @ right
            product *= change.scaling
            low, high = max(begin, start), min(begin + BLOCK_ROWS, stop)
            target = rows[low - start : high - start]
            target[...] = target + product[low - begin : high - begin]

    # ---------------------------------------------------------------------------------------------- side files

    def _make_directory(self) -> Path:
        """Return the base's directory, or one in which the adapter's own side files replace the base's."""
        own = find_sidecars(self._adapter)
        if not own:
            return self._base.directory
        files = dict(find_sidecars(self._base.directory))
        if any(all(name in own for name in names) for names in VOCABULARIES):
            # A tokenizer is taken whole: a mixture of two would be neither.
            files = {name: path for name, path in files.items() if name not in TOKENIZER_NAMES}
        if MODULES_NAME in own:
            files = {name: path for name, path in files.items() if name not in SENTENCE_NAMES}
        directory = self._temporary_directory()
        for name, path in (files | own).items():
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, directory / name)
        shutil.copyfile(self._base.directory / CONFIG_NAME, directory / CONFIG_NAME)
        return directory

    def _paths(self) -> Mapping[str, Path]:
        names = [ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME]
        names += [name for name in SIDECAR_NAMES if (self._adapter / name).exists()]
        return {f"adapter/{name}": contained(self._adapter, name) for name in names}

    def files(self) -> tuple[SourceFile, ...]:
        """Return the base's files and the adapter's (as ``adapter/NAME``) with their SHA-256."""
        return (*self._base.files(), *super().files())

    def stamps(self) -> Mapping[str, tuple[int, ...]]:
        """Return the base's and the adapter's."""
        return {**self._base.stamps(), **super().stamps()}

    def close(self) -> None:
        """Close the adapter and the base."""
        self._weights.close()
        self._base.close()
        super().close()


def _peft_name(module: str, key: str) -> str:
    """Return the module's name as PEFT sees it, which its patterns are matched with."""
    match = _FACTOR.fullmatch(key.removeprefix(PEFT_PREFIX))
    return match["module"] if match else module


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise SourceError(
            "there is no such adapter directory",
            where=str(directory),
            hint=f"give a directory with {ADAPTER_CONFIG_NAME} and {ADAPTER_WEIGHTS_NAME}",
        )
    if not (directory / ADAPTER_CONFIG_NAME).exists():
        raise SourceError(
            f"{ADAPTER_CONFIG_NAME} is missing", where=directory.name, hint="give a PEFT adapter's directory"
        )
    if (directory / ADAPTER_WEIGHTS_NAME).exists():
        return
    if any(directory.glob("adapter_model*.bin")):
        raise SourceError(
            "the adapter is pickled; a pickle runs code when it is read, so it is refused",
            where=directory.name,
            hint="if you trust it, load it with peft and save it again: save_pretrained writes safetensors",
        )
    raise SourceError(
        f"{ADAPTER_WEIGHTS_NAME} is missing", where=directory.name, hint="copy the adapter again, all of it"
    )
