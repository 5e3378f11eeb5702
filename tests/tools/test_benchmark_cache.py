"""The benchmark of caches runs artifacts behind a prompt, and compares within a round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import benchmark_cache
import benchmark_speed
import pytest
from benchmark_cache import parse, run, table

from tiny_models import INT8_CACHE


def test_two_artifacts_are_run_behind_a_prompt(
    tiny_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_speed, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(benchmark_speed, "read_bandwidth", lambda threads: 1.0)
    floats, kept = tiny_artifact("llama", "float"), tiny_artifact("llama", "float", *INT8_CACHE)
    words = [f"floats={floats}", f"bytes={kept}", "--behind", "40", "--new", "3", "--rounds", "1", "--threads", "1"]
    results = run(parse(words))
    rounds, peaks = results[40]
    assert list(peaks) == ["floats", "bytes"] and min(peaks.values()) > 10_000_000
    assert [set(rates) for rates in rounds[0].values()] == [{"prefill 40", "decode"}] * 2
    assert len(table(results)) == 4


def test_ratios_are_within_a_round() -> None:
    rounds = [
        {"a": {"decode": 10 * slow, "prefill 4": 40 * slow}, "b": {"decode": 20 * slow, "prefill 4": 10 * slow}}
        for slow in (1.0, 5.0, 1.0)
    ]
    *_, first, second = table({4: (rounds, {"a": 3_000_000, "b": 1_500_000})})
    assert first == "| 4 | a | 100.0 |  | 0.10 |  | 3 |"
    assert second == "| 4 | b | 50.0 | 0.50 (0.50-0.50) | 0.40 | 4.00 (4.00-4.00) | 2 |"


@pytest.mark.parametrize("more", [["--rounds", "0"], ["--behind", "0"]])
def test_what_cannot_be_timed_is_refused(more: list[str], tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    good = f"a={tiny_artifact('llama', 'float')}"
    for words in ([good, *more], ["a"], [f"a={tmp_path}"], [good, good]):
        with pytest.raises(SystemExit):
            benchmark_cache.parse(words)
