"""Every parser ends well or by one clear error: on the corpus, and on cases that hypothesis makes of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import mutations
import pytest
import targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.errors import CompressError

CORPUS = Path(__file__).with_name("corpus")
#: Cases a target in the suite; tools/fuzz.py runs as many as wanted.
CASES = 60

pytestmark = pytest.mark.filterwarnings("ignore")  # what numpy and torch think of odd numbers is not the question


def files(target: str) -> list[Path]:
    return sorted((CORPUS / target).iterdir())


def test_every_target_has_seeds_and_no_seed_is_without_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(targets.TARGETS)
    assert all(files(name) for name in targets.TARGETS)
    assert all(path.stat().st_size < 64 << 10 for name in targets.TARGETS for path in files(name))


@pytest.mark.parametrize("target", sorted(targets.TARGETS))
def test_the_corpus_is_replayed(target: str) -> None:
    """Seeds are accepted, at least one of each target; what once crashed a parser is refused or read."""
    outcomes = {path.name: targets.run(target, path.read_bytes()) for path in files(target)}
    assert any(accepted for name, accepted in outcomes.items() if not name.startswith("crash"))


@pytest.mark.parametrize("target", sorted(targets.TARGETS))
def test_mutated_seeds(target: str) -> None:
    seeds = [path.read_bytes() for path in files(target)]

    @settings(
        max_examples=CASES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(seeds), st.integers(0, 2**32))
    def check(seed: bytes, number: int) -> None:
        targets.run(target, mutations.mutate(seed, seeds, random.Random(number)))

    check()


def raising(error: BaseException) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        raise error

    return target


@pytest.mark.parametrize(
    "error",
    [ValueError("no"), MemoryError(), RecursionError(), KeyError("a"), UnicodeEncodeError("utf-8", "", 0, 1, "")],
)
def test_any_other_error_is_a_crash(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a parser that lets one through would be noticed."""
    monkeypatch.setattr(targets, "TARGETS", {"bad": raising(error)})
    with pytest.raises(type(error)):
        targets.run("bad", b"")


@pytest.mark.parametrize("what", ["", "x\n" * 0 + " "])
def test_an_error_without_words_is_a_crash(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "TARGETS", {"bad": raising(CompressError(what))})
    with pytest.raises(AssertionError, match="without words"):
        targets.run("bad", b"")
