"""Export one checkpoint with `compress` and with the onnxruntime-genai builder; compare peak memory and time.

    python tools/benchmark_export.py CHECKPOINT [--repeat N] [--append docs/benchmarks.md]

Both run on the same input, in turn when repeated, each as a child process of its own, after the input was read once so
that neither pays for a cold disk. The builder has its own environment with pinned versions, made on first use and kept
in a cache folder. What the memory columns mean stands in measured_export.py.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measured_export import (
    BUILDER_PINS,
    MB,
    Run,
    builder_python,
    compress_command,
    default_cache,
    machine,
    measure,
    publish,
    warm,
)


def run_once(tool: str, source: Path, profile: str, python: Path | None, scratch: Path) -> Run:
    """Export ``source`` with one tool into a fresh folder under ``scratch``, which is deleted afterwards."""
    out, cache = scratch / f"{tool}-out", scratch / f"{tool}-cache"
    if tool == "compress":
        command = [*compress_command(), "export", str(source), "--profile", profile, "--no-validate", "-o", str(out)]
    else:
        builder = [str(python), "-m", "onnxruntime_genai.models.builder"]
        command = [*builder, "-i", str(source), "-o", str(out), "-p", "int4", "-e", "cpu", "-c", str(cache)]
    warm(source)
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1"}
    try:
        return measure(tool, command, out, scratch / f"{tool}.log", environment)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------- report


def versions(tools: Sequence[str]) -> str:
    """Name the versions that matter, of both environments."""
    mine = ("compress-slm", "torch", "transformers", "onnxruntime", "mobius-onnx")
    found = []
    for package in mine:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} (not installed as a package)")
    text = f"Python {platform.python_version()}; compress: {', '.join(found)}"
    return (
        f"{text}; builder: {', '.join(pin.replace('==', ' ') for pin in BUILDER_PINS)}" if "builder" in tools else text
    )


def _spread(values: Sequence[float], unit: float, digits: int) -> str:
    middle = f"{statistics.median(values) / unit:.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values) / unit:.{digits}f}-{max(values) / unit:.{digits}f})"


def table(runs: Sequence[Run]) -> str:
    """Return a Markdown table, a row for each tool: medians, with the range when repeated; then the ratios."""
    lines = [
        "| tool | runs | time, s | largest process, MB | tree, MB | anonymous, MB | model.onnx + data, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.tool, []).append(run)
    for tool, group in groups.items():
        cells = [
            _spread([run.seconds for run in group], 1, 1),
            _spread([run.largest_process for run in group], MB, 0),
            _spread([run.tree for run in group], MB, 0),
            _spread([run.anonymous for run in group], MB, 0),
            _spread([run.artifact for run in group], MB, 1),
        ]
        lines.append(f"| {tool} | {len(group)} | {' | '.join(cells)} |")
    if {"compress", "builder"} <= set(groups):
        fields = ("seconds", "largest_process", "tree", "anonymous", "artifact")
        ratios = [
            statistics.median(getattr(run, field) for run in groups["compress"])
            / statistics.median(getattr(run, field) for run in groups["builder"])
            for field in fields
        ]
        lines.append(f"| compress / builder | | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return "\n".join(lines)


def describe(source: Path) -> str:
    """Say what the input is: its architecture, layers and the size of its weights."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    hidden = config.get("hidden_size", config.get("n_embd"))
    size = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 1e9
    return (
        f"{config['model_type']}, {layers} layers, hidden size {hidden}, {size:.2f} GB of {config.get('torch_dtype')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a local Hugging Face directory")
    parser.add_argument("--profile", default="arm-int4")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each tool, in turn")
    parser.add_argument("--only", choices=("compress", "builder"), help="measure one of the two")
    parser.add_argument(
        "--scratch", type=Path, help="where artifacts are written and deleted (default: a temporary folder)"
    )
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where the builder's environment is kept")
    parser.add_argument("--append", type=Path, help="add the result to this Markdown file")
    options = parser.parse_args()
    source = options.checkpoint.resolve()
    if not (source / "config.json").is_file():
        parser.error(f"{source} has no config.json")
    tools = [options.only] if options.only else ["compress", "builder"]
    python = builder_python(options.cache) if "builder" in tools else None
    where = machine()
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for turn in range(options.repeat):
            # Turn about, so that a drift of the machine does not favour whoever goes first.
            for tool in tools if turn % 2 == 0 else reversed(tools):
                runs.append(run_once(tool, source, options.profile, python, Path(scratch)))
                last = runs[-1]
                print(f"{tool}: {last.seconds:.1f} s, {last.tree / MB:.0f} MB", file=sys.stderr)
    day = datetime.datetime.now(tz=datetime.UTC).date()
    heading = f"### Export of {source.name} under `{options.profile}`, {day}"
    facts = f"- Input: {describe(source)}\n- Machine: {where}\n- Versions: {versions(tools)}"
    section = f"{heading}\n\n{table(runs)}\n\n{facts}\n"
    publish(section, options.append)


if __name__ == "__main__":
    main()
