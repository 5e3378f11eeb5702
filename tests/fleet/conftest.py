"""A desk for sweeps, and exports of tiny models that take a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fleet_desk import FAKE, Desk

from compress.fleet import jobs, local, run
from tiny_models import PLAIN_INT8


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    made = Desk(tmp_path)
    monkeypatch.setattr(jobs, "LAUNCHER", FAKE)
    monkeypatch.setattr(run, "predicted_peak", lambda job, threads, limit: made.peaks.get(job.name, 1_000))
    # What this process takes itself is taken off the limit, and other tests have made it large.
    monkeypatch.setattr(local, "peak_rss_bytes", lambda: 100_000_000)
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    return made


@pytest.fixture
def quick(tiny_artifact: Callable[..., Path], skeletons: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes exports of tiny models, as sweeps start them, quick ones."""

    def prepare(*names: str) -> None:
        for name in names:
            tiny_artifact(name, "float" if ":" not in name else PLAIN_INT8)  # its skeleton is kept from here on
        monkeypatch.setattr(jobs, "LAUNCHER", (str(Path(__file__).with_name("quick_export.py")),))
        monkeypatch.setenv("TEST_SKELETONS", str(skeletons._directory))

    return prepare
