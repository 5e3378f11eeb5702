"""Graphs that are ready to be built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from prepared import Prepare, Prepared, prepared

from tiny_models import Skeletons


@pytest.fixture
def prepare(tiny_model: Callable[[str], Path], skeletons: Skeletons, tmp_path: Path) -> Prepare:
    """Return a function from name, profile and ``KEY=VALUE`` overrides to what a graph is built of."""

    def get(name: str, profile: str = "arm-int4", *overrides: str) -> Prepared:
        return prepared(tiny_model(name), skeletons, tmp_path, profile, *overrides)

    return get
