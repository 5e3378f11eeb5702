"""The contract tests' sample of source kind `directory`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file


def make(tmp_path: Path, tiny: Callable[[str], Path], patch: pytest.MonkeyPatch) -> tuple[str, dict[str, np.ndarray]]:
    directory = shutil.copytree(tiny("llama"), tmp_path / "model")
    return str(directory), load_file(directory / "model.safetensors")
