"""The contract tests' sample of source kind `package`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file


def install(site: Path, model: Path, *, name: str = "tiny_model_package", version: str = "3.1.4") -> None:
    """Lay out a package with a model, and its metadata, as pip would; importing it fails."""
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text("raise RuntimeError('this package must not be imported')\n")
    shutil.copytree(model, site / name / "model")
    metadata = site / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")


def make(tmp_path: Path, tiny: Callable[[str], Path], patch: pytest.MonkeyPatch) -> tuple[str, dict[str, np.ndarray]]:
    install(tmp_path / "site", tiny("gpt2"))
    patch.syspath_prepend(str(tmp_path / "site"))
    return "package:tiny_model_package/model", load_file(tiny("gpt2") / "model.safetensors")
