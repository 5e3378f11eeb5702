"""Decoders' calibration in this process: the worker spends ten seconds on its imports for each export.

``tests/test_calibrated_decoders.py`` holds the worker to the same bytes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from threadpoolctl import threadpool_limits

#: Steps a block of algorithms that learn: enough to move every weight.
STEPS = 5


def calibrate_here(patch: pytest.MonkeyPatch) -> None:
    """Let decoders be calibrated here; algorithms that learn take few steps."""
    from compress.calibrate import decoder_worker
    from compress.quantize import load_quantizer

    def run(module: str, request: dict[str, Any], *, timeout: float, progress: Callable[[float], None]) -> Any:
        assert module == "calibrate.decoder_worker" and timeout > 0
        with tempfile.TemporaryDirectory() as job, threadpool_limits(limits=1):
            response = decoder_worker.handle(json.loads(json.dumps(request)), Path(job))
            progress(float((Path(job) / "progress").read_text()))
        return json.loads(json.dumps(response))

    def quick(name: str) -> Any:
        quantizer: Any = load_quantizer(name)
        if hasattr(quantizer, "steps"):
            quantizer.steps = STEPS
        return quantizer

    patch.setattr("compress.calibrate.decoder.run_worker", run)
    patch.setattr("compress.calibrate.decoder_worker.load_quantizer", quick)


def prune_here(patch: pytest.MonkeyPatch) -> None:
    """Let models be pruned here; ``tests/test_pruning.py`` holds the worker to the same bytes."""
    from compress.prune import worker

    def run(module: str, request: dict[str, Any], *, timeout: float, progress: Any = None) -> Any:
        assert module == "prune.worker" and timeout > 0
        with tempfile.TemporaryDirectory() as job, threadpool_limits(limits=1):
            return json.loads(json.dumps(worker.handle(json.loads(json.dumps(request)), Path(job))))

    patch.setattr("compress.prune.run.run_worker", run)
    patch.setattr("compress.prune.find.run_worker", run)
