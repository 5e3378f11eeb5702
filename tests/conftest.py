"""Fixtures that all tests share: tiny models, their skeletons and their artifacts, each made once a run.

Several test workers share them too: what one has made, the others find.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # a thread each: workers share the cores
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import pytest

from forked_workers import Starter, forked_workers
from made_once import made_once
from tiny_models import Skeletons, save_tiny_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: a test worker that gets one last keeps the others waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def workers() -> Iterator[Starter | None]:
    """Fork the workers that import PyTorch, where a process can be forked; see ``forked_workers``."""
    if not sys.platform.startswith("linux"):
        yield None
        return
    with forked_workers() as starter:
        yield starter


@pytest.fixture(scope="module")
def real_workers() -> Iterator[None]:
    """Start every worker as users do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.validation.protocol.subprocess", subprocess)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of this run that all its test workers have."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_model(shared: Path) -> Callable[[str], Path]:
    """Return a function from a name (``llama``, ``bert:fill-mask``) to its saved tiny model; read only."""

    def get(name: str) -> Path:
        return made_once(shared / f"tiny-{name.replace(':', '-')}", lambda place: save_tiny_model(name, place))

    return get


@pytest.fixture(scope="session")
def skeletons(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Skeletons]:
    """Return the kept skeletons: of earlier runs too, unless pytest keeps no cache."""
    cache = getattr(request.config, "cache", None)
    kept = Skeletons(tmp_path_factory.mktemp("skeletons") if cache is None else cache.mkdir("skeletons"))
    yield kept
    kept.close()


@pytest.fixture
def fast_skeletons(skeletons: Skeletons, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let exports of this test use the kept skeletons."""
    monkeypatch.setattr("compress.graph.skeleton.build_skeleton", skeletons.build)


@pytest.fixture(scope="session")
def tiny_artifact(tiny_model: Callable[[str], Path], skeletons: Skeletons, shared: Path) -> Callable[..., Path]:
    """Return a function from name, profile and ``KEY=VALUE`` overrides to an artifact, each made once; read only."""

    def get(name: str, profile: str = "arm-int4", *overrides: str) -> Path:
        from compress import pipeline
        from compress.profile import load_profile
        from compress.progress import Stages

        def make(output: Path) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("compress.graph.skeleton.build_skeleton", skeletons.build)
                pipeline.export(
                    pipeline.ModelReference(str(tiny_model(name))),
                    load_profile(profile, overrides),
                    output,
                    pipeline.ExportOptions(validate=False, threads=1),
                    Stages(),
                )

        digest = hashlib.sha256("\n".join((name, profile, *overrides)).encode()).hexdigest()[:12]
        return made_once(shared / f"{name.replace(':', '-')}-{Path(profile).stem}-{digest}", make)

    return get


@pytest.fixture(scope="session")
def docstring_classifier(shared: Path) -> Path:
    """Return a trained ``BertForSequenceClassification`` directory with its ``test.jsonl`` (text, label); read only.

    Making it takes half a minute of computing; skips where the encoder's package is not installed.
    """
    import labelled_text

    source = labelled_text.pretrained()
    if source is None:
        pytest.skip(f"needs the package {labelled_text.PACKAGE.replace('_', '-')}")
    return made_once(shared / "docstrings", lambda place: labelled_text.save_classifier(source, place))
