"""Time artifacts behind long texts: what a cache of bytes saves of a token and of the memory, and costs a prompt.

    python tools/benchmark_cache.py floats=DIR bytes=OTHER [--behind 128 --behind 2048] [--append docs/performance.md]

Artifacts of one model, each in a process of its own (speed_worker.py), take turns in every round: a prompt at once,
then tokens one by one, into one key/value cache that is made for them. Ratios are within a round, to the first artifact
named. Memory is the process's peak once it has read the prompt and written some tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark_speed import measure, start
from measured_export import MB, machine, model_bytes, publish
from speed_contenders import Contender
from speed_report import Rates, rates, spread

#: Tokens in front of those that are timed.
BEHIND = (128, 2048)


def contender_of(text: str) -> Contender:
    """Read ``NAME=DIRECTORY``.

    Raises:
        ValueError: It is none, or no artifact is there.
    """
    name, separator, directory = text.partition("=")
    model = Path(directory) / "model.onnx"
    if not separator or not name or not model.is_file():
        raise ValueError(f"{text}: NAME=DIRECTORY of an artifact was expected")
    size = model_bytes(model.parent)
    return Contender("ours", name, "onnx", Path(sys.executable), model, size, size)


def vocabulary_of(contenders: Sequence[Contender]) -> int:
    """Return how many token ids there are.

    Raises:
        ValueError: The artifacts are of models with different numbers.
    """
    configs = [json.loads((each.model.parent / "config.json").read_text(encoding="utf-8")) for each in contenders]
    found = {int(config["vocab_size"]) for config in configs}
    if len(found) != 1:
        raise ValueError(f"these are artifacts of different models: {sorted(found)} tokens")
    return found.pop()


def table(results: Mapping[int, tuple[Sequence[Mapping[str, Rates]], Mapping[str, int]]]) -> list[str]:
    """Return a row for every length and artifact; ``results``: by length the rounds' rates, and peak bytes by name."""
    lines = [
        "| behind | artifact | ms a token | of the first's | prompt, s | of the first's | peak memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for length, (rounds, peaks) in results.items():
        first = next(iter(peaks))
        for name, peak in peaks.items():
            cells = [str(length), name]
            for metric, factor, digits in (("decode", 1e3, 1), (f"prefill {length}", float(length), 2)):
                each = [factor / of[name][metric] for of in rounds]
                shares = [of[first][metric] / of[name][metric] for of in rounds]
                cells += [f"{statistics.median(each):.{digits}f}", "" if name == first else spread(shares, 2)]
            lines.append(f"| {' | '.join([*cells, f'{peak / MB:,.0f}'])} |")
    return lines


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifacts", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--behind", type=int, action="append", help=f"tokens of a prompt (default: {BEHIND})")
    parser.add_argument("--new", type=int, default=16, help="tokens decoded in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--append", type=Path, help="add the result to this Markdown file")
    options = parser.parse_args(arguments)
    options.behind = options.behind or list(BEHIND)
    if min(*options.behind, options.new, options.threads, options.rounds) < 1:
        parser.error("lengths, threads and rounds are 1 or more")
    options.environment = {}
    try:
        options.contenders = [contender_of(text) for text in options.artifacts]
        options.vocabulary = vocabulary_of(options.contenders)
    except (OSError, ValueError, KeyError) as error:
        parser.error(str(error))
    if len({each.name for each in options.contenders}) < len(options.contenders):
        parser.error("two artifacts have one name")
    return options


def run(options: argparse.Namespace) -> dict[int, tuple[list[dict[str, Rates]], dict[str, int]]]:
    """Return by length what :func:`table` shows.

    Raises:
        SystemExit: An artifact cannot be run.
    """
    results = {}
    for length in options.behind:
        options.prompt = [length]
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            workers, missing = start(options.contenders, options, scratch, stack)
            if missing:
                raise SystemExit("\n".join(f"{entry.name}: {entry.reason}" for entry in missing))
            answers, _ = measure(workers, options)
            peaks: dict[str, Any] = {worker.name: worker.facts["peak_rss_bytes"] for worker in workers}
        results[length] = [{name: rates(answer) for name, answer in each.items()} for each in answers], peaks
    return results


def main() -> None:
    options = parse()
    where = machine()
    lines = table(run(options))
    sizes = ", ".join(f"{each.name} {each.bytes / MB:,.0f} MB" for each in options.contenders)
    lines += [
        "",
        f"{options.threads} threads, {options.rounds} rounds, medians (ranges of ratios). Artifacts: {sizes}. {where}.",
    ]
    publish("\n".join(lines) + "\n", options.append)


if __name__ == "__main__":
    main()
