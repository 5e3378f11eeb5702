"""What the benchmarks share: environments for peers, and exports run as processes whose time and memory are measured.

Memory, for a whole tree of processes:
- *largest process*: the greatest resident set of any one process, from the kernel's own accounting (``wait4``), exact.
  A child's peak includes what its parent held when it was started: so what measures imports nothing large before.
- *tree*: the greatest sum of resident sets at one moment, sampled from /proc every 20 ms; pages that processes share
  are counted once for each.
- *anonymous*: the same sum without pages that are backed by files (a mapped checkpoint, libraries), which the kernel
  can drop under pressure. It is what a process cannot do without.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
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
    """What one export took; bytes and seconds. ``exit_code`` is one of those that count as done."""

    tool: str
    seconds: float
    largest_process: int
    tree: int
    anonymous: int
    artifact: int
    exit_code: int = 0


@dataclass(frozen=True)
class Missing:
    """A contender that is not in the tables, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Build:
    """How an environment's packages are compiled: pip's options, environment variables, and what both are known by.

    ``known`` stands for them in the environment's record: the variables may hold paths of this machine.
    """

    options: tuple[str, ...]
    environment: Mapping[str, str]
    known: tuple[str, ...]


class ExportError(SystemExit):
    """An export that failed; ends the tool with its message unless somebody can do without."""


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


def measure(
    tool: str,
    command: Sequence[str],
    out: Path,
    log: Path,
    environment: Mapping[str, str],
    accepted: Sequence[int] = (0,),
) -> Run:
    """Run ``command``, which writes its artifact into ``out``, and account for all of its processes.

    Raises:
        ExportError: It failed, which is any exit code that is not ``accepted``; the message holds the end of its log.
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
    if child.returncode not in accepted:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise ExportError(f"{tool} failed with exit code {child.returncode}: {' '.join(command)}\n{tail}")
    artifact = model_bytes(out)
    if not artifact:
        raise ExportError(f"{tool} exited {child.returncode} but wrote no model.onnx into {out}")
    largest = 1024 * usage.ru_maxrss
    # A short-lived process can lie between two samples, so the tree's peak is at least that of its largest process.
    return Run(tool, seconds, largest, max(sampler.tree, largest), sampler.anonymous, artifact, child.returncode)


def model_bytes(directory: Path) -> int:
    """Return the bytes of a directory's ``model.onnx`` and its external data, 0 if there is none."""
    if not (directory / "model.onnx").is_file():
        return 0
    return sum(path.stat().st_size for path in directory.iterdir() if path.name.startswith("model.onnx"))


def warm(directory: Path) -> None:
    """Read the input once, as far as memory lets the kernel keep it."""
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
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


def pinned_python(folder: Path, pins: Sequence[str], build: Build | None = None) -> Path:
    """Return the interpreter of an environment, made if it is missing or was pinned or compiled otherwise.

    Raises:
        CalledProcessError: It cannot be made; pip has said why.
    """
    python, stamp = folder / "bin" / "python", folder / "pins.json"
    known = [*pins, *(build.known if build else ())]
    if stamp.exists() and json.loads(stamp.read_text()) == known:
        return python
    print(f"making an environment in {folder} (once, minutes)", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    command = [str(python), "-m", "pip", "install", "--quiet", *(build.options if build else ()), *pins]
    subprocess.run(command, check=True, env=dict(os.environ) | dict(build.environment if build else {}))
    stamp.write_text(json.dumps(known))
    return python


def compress_command() -> list[str]:
    """Return how to start the `compress` of this environment."""
    script = Path(sys.executable).with_name("compress")
    return [str(script)] if script.exists() else [sys.executable, "-m", "compress.cli"]


def publish(section: str, file: Path | None) -> None:
    """Print a section of Markdown, and add it to a file if one is given."""
    print(section)
    if file is not None:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(f"\n{section}")


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
