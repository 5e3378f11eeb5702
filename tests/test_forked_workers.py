"""Forked workers are workers: the same answers, their own process, variables and log, and what goes wrong is told."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compress.errors import CompressError, WorkerError
from compress.validation.protocol import CheckpointSpec, Json, run_worker
from forked_workers import Starter
from tiny_models import VOCABULARY

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked on Linux")


def logits(model: Path, place: Path) -> tuple[bytes, Json]:
    np.save(place / "windows.npy", np.random.default_rng(0).integers(3, VOCABULARY, (2, 16)))
    jobs = [{"kind": "logits", "windows": str(place / "windows.npy"), "output": str(place / "logits.npy")}]
    request = {"checkpoint": CheckpointSpec(str(model)).as_request(), "threads": 1, "jobs": jobs}
    answer = run_worker("reference", request, timeout=240)
    return (place / "logits.npy").read_bytes(), answer


def test_a_forked_worker_gives_the_real_ones_bytes(
    workers: Starter, tiny_model: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count = len(workers.forked)
    forked, answer = logits(tiny_model("llama"), tmp_path)
    assert workers.forked[count:] == ["compress.validation.reference"]
    request.getfixturevalue("real_workers")
    real, other = logits(tiny_model("llama"), tmp_path)
    assert len(workers.forked) == count + 1 and real == forked
    assert answer.keys() == other.keys()


def test_an_error_keeps_its_class_and_a_hang_is_ended(workers: Starter, tmp_path: Path) -> None:
    with pytest.raises(CompressError) as caught:
        run_worker("tokenization", {"directory": str(tmp_path), "texts": ["a"]}, timeout=120)
    assert "no tokenizer that transformers can read" in caught.value.what
    with pytest.raises(WorkerError, match="hung: no answer within 0 s"):
        run_worker("reference", {"reference": "nowhere"}, timeout=0)


def test_a_forked_worker_has_its_own_process_variables_and_exit_code(workers: Starter, tmp_path: Path) -> None:
    """A module of this test's own, as a worker that says who it is and ends badly."""
    (tmp_path / "own.py").write_text(
        "import json, os, pathlib\n"
        "handle = None\n"
        "def serve(handle, arguments):\n"
        "    told = [os.getpid(), os.getpgid(0), os.environ['TOLD'], 'HOME' in os.environ]\n"
        "    pathlib.Path(arguments[0], 'told').write_text(json.dumps(told))\n"
        "    print('the end')\n"
        "    os.abort()\n"
    )
    (tmp_path / "log").touch()
    environment = {"PYTHONPATH": str(tmp_path), "TOLD": "yes", "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forked_workers.MODULES", {"own"})
        process = workers.Popen([sys.executable, "-P", "-m", "own", str(tmp_path)], env=environment)
    assert process.wait(60) == -6
    assert json.loads((tmp_path / "told").read_text()) == [process.pid, process.pid, "yes", False]
    assert process.pid != os.getpid() and "the end" in (tmp_path / "log").read_text()
