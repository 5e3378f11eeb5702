"""Export one checkpoint with `compress` and with the onnxruntime-genai builder; compare peak memory and time.

    python tools/benchmark_export.py CHECKPOINT [--repeat N] [--append docs/benchmarks.md]

Both run on the same input, in turn when repeated, each as a child process of its own, after the
input was read once so that neither pays for a cold disk. The builder has its own environment with pinned versions, made
on first use and kept in a cache folder.

Memory, for a whole tree of processes:
- *largest process*: the greatest resident set of any one process, from the kernel's own accounting (``wait4``), exact.
  A child's peak includes what its parent held when it was started: so this tool imports nothing large.
- *tree*: the greatest sum of resident sets at one moment, sampled from /proc every 20 ms; pages that processes share
  are counted once for each.
- *anonymous*: the same sum without pages that are backed by files (a mapped checkpoint, libraries), which the kernel
  can drop under pressure. It is what a process cannot do without.
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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BUILDER_PINS = (
    "onnxruntime-genai==0.18.0",
    "onnxruntime==1.31.1",
    "torch==2.13.0",
    "transformers==5.23.0",
    "onnx==1.23.2",
    "onnx-ir==1.1.0",
)
SAMPLE_SECONDS = 0.02
MB = 1e6


@dataclass(frozen=True)
class Run:
    """What one export took; bytes and seconds."""

    tool: str
    seconds: float
    largest_process: int
    tree: int
    anonymous: int
    artifact: int


# ------------------------------------------------------------------------------------------------------- measuring


def _resident(pid: int) -> tuple[int, int]:
    """Return a process's resident and anonymous bytes, zeros if it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    kib = {
        key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines) if key.startswith("Rss")
    }
    anonymous = kib.get("RssAnon", 0) + kib.get("RssShmem", 0)
    return 1024 * (anonymous + kib.get("RssFile", 0)), 1024 * anonymous


def _tree(root: int) -> list[int]:
    """Return a process and its descendants, of all its threads."""
    found, pending = [], [root]
    while pending:
        pid = pending.pop()
        found.append(pid)
        try:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                pending += map(int, (thread / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


class _Sampler(threading.Thread):
    """Keeps the largest sums seen over a tree of processes."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root, self.done = root, threading.Event()
        self.tree = self.anonymous = 0

    def run(self) -> None:
        while not self.done.wait(SAMPLE_SECONDS):
            sizes = [_resident(pid) for pid in _tree(self.root)]
            self.tree = max(self.tree, sum(resident for resident, _ in sizes))
            self.anonymous = max(self.anonymous, sum(anonymous for _, anonymous in sizes))


def measure(tool: str, command: Sequence[str], out: Path, log: Path, environment: Mapping[str, str]) -> Run:
    """Run ``command``, which writes its artifact into ``out``, and account for all of its processes.

    Raises:
        SystemExit: It failed; the message holds the end of its log.
    """
    with log.open("wb") as sink:
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=dict(environment))
        sampler = _Sampler(child.pid)
        sampler.start()
        # wait4 accounts for the child and for every descendant that was waited for: ru_maxrss is the largest of them.
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
    sampler.done.set()
    sampler.join()
    if child.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{tool} failed with exit code {child.returncode}: {' '.join(command)}\n{tail}")
    artifact = sum(path.stat().st_size for path in out.iterdir() if path.name.startswith("model.onnx"))
    if not artifact:
        raise SystemExit(f"{tool} exited 0 but wrote no model.onnx into {out}")
    largest = 1024 * usage.ru_maxrss
    # A short-lived process can lie between two samples, so the tree's peak is at least that of its largest process.
    return Run(tool, seconds, largest, max(sampler.tree, largest), sampler.anonymous, artifact)


def warm(directory: Path) -> None:
    """Read the input once, as far as memory lets the kernel keep it."""
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


# ----------------------------------------------------------------------------------------------------------- tools


def default_cache() -> Path:
    """Return the folder where the builder's environment is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress-benchmark"


def builder_python(cache: Path) -> Path:
    """Return the interpreter of the builder's environment."""
    return pinned_python(cache / "onnxruntime-genai-builder", BUILDER_PINS)


def pinned_python(folder: Path, pins: Sequence[str]) -> Path:
    """Return the interpreter of an environment, made if it is missing or was pinned otherwise.

    Raises:
        CalledProcessError: It cannot be made; pip has said why.
    """
    python, stamp = folder / "bin" / "python", folder / "pins.json"
    if stamp.exists() and json.loads(stamp.read_text()) == list(pins):
        return python
    print(f"making an environment in {folder} (once, minutes)", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *pins], check=True)
    stamp.write_text(json.dumps(list(pins)))
    return python


def compress_command() -> list[str]:
    """Return how to start the `compress` of this environment."""
    script = Path(sys.executable).with_name("compress")
    return [str(script)] if script.exists() else [sys.executable, "-m", "compress.cli"]


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


def machine() -> str:
    """Describe this machine in one line, its load included: a busy machine's times are worth little."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    return (
        f"{model}, {cores} cores, {memory:.0f} GB, {platform.system()} {platform.release()}, load {load:.1f} at start"
    )


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
    print(section)
    if options.append:
        with options.append.open("a", encoding="utf-8") as file:
            file.write(f"\n{section}")


if __name__ == "__main__":
    main()
