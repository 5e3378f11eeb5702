"""The contract tests' sample of source kind `hub`: a cache as huggingface_hub lays it out, read offline."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(cache: Path, model: Path, hub_id: str, *, leave_out: tuple[str, ...] = ()) -> Path:
    """Put a model into a cache, as links from a snapshot into the blobs, and return the snapshot."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        name = file.relative_to(model)
        if name.as_posix() not in leave_out:
            blob = repository / "blobs" / f"{number:040x}"
            shutil.copyfile(file, blob)
            (snapshot / name).parent.mkdir(exist_ok=True)
            (snapshot / name).symlink_to(Path("../" * len(name.parts)) / "../blobs" / blob.name)
    return snapshot


def make(tmp_path: Path, tiny: Callable[[str], Path], patch: pytest.MonkeyPatch) -> tuple[str, dict[str, np.ndarray]]:
    from huggingface_hub import constants

    fill_cache(tmp_path / "hub", tiny("phi3"), "owner/tiny-phi3")
    patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return "owner/tiny-phi3", load_file(tiny("phi3") / "model.safetensors")
