"""BLAS adds in an order that depends on its threads: while weights are written, there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from compress import pipeline, weights
from compress.package.writer import DataFile
from compress.planning import make_plan
from compress.profile import load_profile
from compress.quantize.gptq import Gptq
from compress.source import open_checkpoint
from tiny_models import PLAIN_INT8


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


class Watching(Gptq):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def quantize(self, *given: Any, **named: Any) -> Any:
        self.seen |= blas_threads()
        return super().quantize(*given, **named)


def test_weights_are_quantized_with_one_blas_thread(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    profile, quantizer = load_profile(PLAIN_INT8), Watching()
    with open_checkpoint(str(tiny_model("bert:embedding"))) as checkpoint:
        plan = make_plan(pipeline.describe(checkpoint), profile, checkpoint)
        with threadpool_limits(limits=3, user_api="blas"), DataFile(tmp_path / "data", plan.data_bytes) as data:
            if blas_threads() != {3}:
                pytest.skip("this BLAS takes no number of threads")
            weights.write_weights(plan, checkpoint, quantizer, data, calibrate=None, threads=2)
            assert quantizer.seen == {1}
            assert blas_threads() == {3}, "the caller's number is back"


def test_sums_do_depend_on_threads() -> None:
    """The control: were it not so, nothing would have to be done (skips where BLAS adds in one order)."""
    random = np.random.default_rng(0)
    moments = random.normal(size=(800, 384))
    moments = moments.T @ moments / 800 + np.eye(384)
    found = []
    for threads in (1, 2, 3):
        with threadpool_limits(limits=threads, user_api="blas"):
            found.append(np.linalg.inv(moments))
    if all(np.array_equal(found[0], other) for other in found[1:]):
        pytest.skip("this BLAS gives the same bits for any number of threads")
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-12)
