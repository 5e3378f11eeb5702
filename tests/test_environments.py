"""Environments in the cache: made whole or not at all, renewed with their pins, never the user's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compress import environments
from compress.environments import Environment, cache_directory
from compress.errors import ProviderError


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Commands that an installation runs; ``venv`` makes an interpreter, nothing else is done."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    seen: list[list[str]] = []

    def run(command: list[str], *, what: str, cwd: Path | None = None) -> None:
        seen.append(list(command))
        if command[1:3] == ["-m", "venv"]:
            python = Path(command[3]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()
        elif "broken" in command:
            raise ProviderError(what)

    monkeypatch.setattr(environments, "run", run)
    return seen


def test_an_environment_is_made_once(steps: list[list[str]]) -> None:
    environment, said = Environment("some", ("package==1",)), list[str]()
    assert not environment.installed
    environment.install(said.append)
    assert environment.installed and len(steps) == 2 and len(said) == 2
    assert steps[0][0] == sys.executable and steps[1][0] == str(environment.python)
    assert "package==1" in steps[1] and "--only-binary=:all:" in steps[1]
    assert environment.folder.is_relative_to(cache_directory())
    environment.install(said.append)
    assert len(steps) == 2 and "already installed" in said[-1]


def test_other_pins_are_another_environment(steps: list[list[str]]) -> None:
    old, new = Environment("some", ("package==1",)), Environment("some", ("package==2",))
    old.install(lambda step: None)
    assert old.installed and not new.installed and old.folder != new.folder


def test_half_an_installation_counts_for_nothing_and_is_begun_anew(steps: list[list[str]]) -> None:
    broken = Environment("some", ("broken",))
    for _ in range(2):
        with pytest.raises(ProviderError, match="pip cannot install broken"):
            broken.install(lambda step: None)
        assert broken.python.exists() and not broken.installed
    assert [step[1:3] == ["-m", "venv"] for step in steps] == [True, False, True, False]


def test_a_step_that_fails_shows_what_it_printed() -> None:
    script = "print('one'); print('two'); print('three'); print('the reason'); raise SystemExit(3)"
    with pytest.raises(ProviderError, match="it did not work") as caught:
        environments.run([sys.executable, "-c", script], what="it did not work")
    assert caught.value.hint == "two\nthree\nthe reason"


@pytest.mark.parametrize("failure", [FileNotFoundError("gone"), subprocess.TimeoutExpired("x", 5)])
def test_a_step_that_cannot_run_is_told(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(environments.subprocess, "run", start)
    with pytest.raises(ProviderError, match="it did not work"):
        environments.run(["tool"], what="it did not work")
