"""Predicted memory of a validation against what the kernel counted, on a model whose blocks are large and few."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress import pipeline
from compress.planning import make_plan
from compress.profile import Profile, load_profile
from compress.progress import Stages
from compress.source import open_checkpoint
from compress.validation import room
from compress.validation.protocol import run_worker

#: Two blocks of 48 million weights: 193 MB each as float32.
WIDE = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 2048,
}
LENGTH = 128
#: How far above the measured peak a prediction may be.
SLACK = 1.5


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, random, bfloat16, 210 MB."""
    path = Path(__file__).parents[2] / "tools" / "geometry.py"
    spec = importlib.util.spec_from_file_location("geometry", path)
    assert spec is not None and spec.loader is not None
    geometry: Any = sys.modules.setdefault("geometry", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(geometry)
    directory = tmp_path_factory.mktemp("wide") / "source"
    geometry.CONFIGS["wide"] = WIDE
    try:
        geometry.write("wide", directory)
    finally:
        del geometry.CONFIGS["wide"]
    return directory


@pytest.fixture(scope="module")
def recipe() -> Profile:
    """The profile, validating two windows."""
    return load_profile("arm-int4", [f"validation.tokens={2 * LENGTH}", f"validation.window={LENGTH}"])


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    """Two windows of random tokens."""
    np.save(tmp_path / "windows.npy", np.random.default_rng(0).integers(3, 2000, (2, LENGTH)).astype(np.int64))
    return tmp_path / "windows.npy"


def needed(source: Path, recipe: Profile) -> room.Needs:
    with open_checkpoint(str(source)) as checkpoint:
        return room.needs(make_plan(pipeline.describe(checkpoint), recipe, checkpoint), recipe)


#: The reference worker's job, first by rows and then by blocks, in a process that has done nothing else.
BOTH = """
import sys
import torch
from compress.source import open_checkpoint
from compress.validation import protocol, reference
torch.set_num_threads(1)
source, windows, output = sys.argv[1:]
for by_rows in (True, False):
    item = {"windows": windows, "output": output, "by_rows": by_rows}
    reference.write_logits(open_checkpoint(source), item, lambda fraction: None)
    print(protocol.peak_rss_bytes())
"""


def test_the_reference_takes_what_is_predicted(wide: Path, recipe: Profile, windows: Path) -> None:
    words = [sys.executable, "-c", BOTH, str(wide), str(windows), str(windows.with_name("out.npy"))]
    made = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    by_rows, by_blocks = map(int, made.stdout.split())
    predicted = needed(wide, recipe)
    assert predicted.reference_by_rows is not None
    assert by_rows <= predicted.reference_by_rows - room._MAIN <= SLACK * by_rows
    assert by_blocks <= predicted.reference - room._MAIN <= SLACK * by_blocks
    # What is saved is most of a block: 193 MB, less two bands.
    assert by_blocks - by_rows > 90_000_000


@pytest.mark.usefixtures("fast_skeletons")
def test_a_piece_takes_what_is_predicted(wide: Path, recipe: Profile, windows: Path, tmp_path: Path) -> None:
    options = pipeline.ExportOptions(validate=False, threads=2)
    pipeline.export(pipeline.ModelReference(str(wide)), recipe, tmp_path / "artifact", options, Stages())
    output = str(windows.with_name("out.npy"))
    request = {
        "model": str(tmp_path / "artifact" / "model.onnx"),
        "provider": "cpu",
        "threads": 1,
        "in_pieces": True,
        "jobs": [{"kind": "logits", "windows": str(windows), "output": output}],
    }
    predicted = needed(wide, recipe).artifact_in_pieces
    assert predicted is not None
    peak = run_worker("worker", request, timeout=120)["peak_rss_bytes"]
    assert peak <= predicted - room._MAIN <= SLACK * peak
