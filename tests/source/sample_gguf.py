"""The contract tests' sample of source kind `gguf`: permuted rows, quantized in blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf_writer import write_gguf


def make(tmp_path: Path, tiny: Callable[[str], Path], patch: pytest.MonkeyPatch) -> tuple[str, dict[str, np.ndarray]]:
    path = tmp_path / "model.gguf"
    return str(path), write_gguf(tiny("llama"), path, GGMLQuantizationType.Q8_0)
