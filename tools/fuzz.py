"""Feed every parser hostile cases and see whether each ends well or by one clear error.

``python tools/fuzz.py [--seconds N | --cases N] [TARGET...]``: cases are made of the corpus (tests/fuzz/corpus) by
tests/fuzz/mutations.py, the same ones for the same seed. Each target runs in a process of its own, with a limit of time
a case and of memory; a process that crashes or hangs is started anew, and the case is kept (``--out``).
``--engine atheris`` lets coverage guide the cases where atheris is installed (the extra ``fuzz``).

Prints a row a target: cases, how many were accepted, crashes (anything but a CompressError, or a signal), hangs, the
slowest case, and peak memory beyond the idle process's. Exit code 1 where anything crashed or hung.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import mmap
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests" / "fuzz" / "corpus"
HANG_SECONDS = 10.0
START_SECONDS = 120.0
#: Address space beyond what the process has once everything is imported.
MEMORY_BYTES = 1 << 30
MAX_CASE = 1 << 20
_STATE = struct.Struct("<QQQ")  # cases begun, length of the current one, whether the seeds are done
#: Starts of one target's process, after which the rest of its share is left.
MAX_STARTS = 20


@dataclass
class Found:
    """What came of a target.

    Attributes:
        target: Its name.
        cases: Cases run.
        accepted: Those that were no error.
        crashes: What was raised or died, and its reproducer, each kind once.
        hangs: Reproducers of cases over the time limit.
        slowest: Seconds of the slowest case.
        slowest_sha256: That case's digest.
        peak_bytes: Resident memory beyond the idle process's, at most.
    """

    target: str
    cases: int = 0
    accepted: int = 0
    crashes: dict[str, str] = field(default_factory=dict)
    hangs: list[str] = field(default_factory=list)
    slowest: float = 0.0
    slowest_sha256: str = ""
    peak_bytes: int = 0

    def add(self, other: Found) -> None:
        """Take over what another process of the same target found."""
        self.cases += other.cases
        self.accepted += other.accepted
        self.crashes |= other.crashes
        self.hangs += other.hangs
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        if other.slowest > self.slowest:
            self.slowest, self.slowest_sha256 = other.slowest, other.slowest_sha256


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz, print the table, and return the exit code."""
    options = _options(arguments)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fuzz")]
    if options.child:
        return _child(options)
    known = sorted(importlib.import_module("targets").TARGETS)
    names = options.targets or known
    unknown = set(names) - set(known)
    if unknown:
        print(f"no such target: {', '.join(sorted(unknown))}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    results = []
    for number, name in enumerate(names):
        share = Share(
            cases=None if options.cases is None else -(-options.cases // len(names)),
            seconds=None if options.cases is not None else options.seconds / len(names),
            seed=options.seed * 1000 + number,
        )
        results.append(_fuzz(name, share, options))
        print(_row(results[-1]), file=sys.stderr, flush=True)
    print(_table(results))
    if options.json:
        options.json.write_text(json.dumps([asdict(found) for found in results], indent=2) + "\n")
    return int(any(found.crashes or found.hangs for found in results))


@dataclass
class Share:
    """How much of the whole a target gets: cases or seconds."""

    cases: int | None
    seconds: float | None
    seed: int


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--cases", type=int, help="instead of seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("mutation", "atheris"), default="mutation")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz", help="where reproducers go")
    parser.add_argument("--json", type=Path, help="write what was found here, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# ------------------------------------------------------------------------------------------------------------ watching


def _fuzz(name: str, share: Share, options: argparse.Namespace) -> Found:
    """Run a target until its share is used, in as many processes as that takes."""
    total = Found(name)
    started = time.monotonic()
    for attempt in range(MAX_STARTS):
        left_cases = None if share.cases is None else share.cases - total.cases
        left_seconds = None if share.seconds is None else share.seconds - (time.monotonic() - started)
        if (left_cases is not None and left_cases <= 0) or (left_seconds is not None and left_seconds <= 0.5):
            break
        total.add(_process(name, left_cases, left_seconds, share.seed + 100_003 * attempt, options))
    return total


def _process(name: str, cases: int | None, seconds: float | None, seed: int, options: argparse.Namespace) -> Found:
    with tempfile.TemporaryDirectory(prefix="compress-fuzz-") as work:
        state, answer = Path(work) / "state", Path(work) / "answer"
        state.write_bytes(bytes(_STATE.size + MAX_CASE))
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--child",
            name,
            "--state",
            str(state),
            "--seed",
            str(seed),
        ]
        command += ["--out", str(options.out), "--engine", options.engine]
        command += ["--cases", str(cases)] if cases is not None else ["--seconds", str(seconds)]
        with answer.open("wb") as stream, (Path(work) / "log").open("wb") as log:
            child = subprocess.Popen(command, stdout=stream, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            hung = _watch(child, state)
        begun, length, _ = _STATE.unpack_from(state.read_bytes())
        case = state.read_bytes()[_STATE.size : _STATE.size + length]
        if child.returncode == 0 and not hung:
            return Found(**json.loads(answer.read_text().splitlines()[-1]))
        found = Found(name, cases=begun)
        if hung:
            found.hangs.append(_keep(options.out, name, "hang", case))
        else:
            tail = (Path(work) / "log").read_text(errors="replace").strip().splitlines()[-1:]
            found.crashes[f"exit {child.returncode}: {''.join(tail)[:200]}"] = _keep(options.out, name, "crash", case)
        return found


def _watch(child: subprocess.Popen[bytes], state: Path) -> bool:
    """Wait for a process; returns whether it was killed because a case took too long."""
    seen, since = 0, time.monotonic()
    while True:
        try:
            child.wait(0.2)
            return False
        except subprocess.TimeoutExpired:
            with state.open("rb") as stream:
                begun, _, settled = _STATE.unpack(stream.read(_STATE.size))
            if begun != seen:
                seen, since = begun, time.monotonic()
            # Seeds import everything, which is not what is timed.
            elif time.monotonic() - since > (HANG_SECONDS if settled else START_SECONDS) + 2:
                child.kill()
                child.wait()
                return True


def _keep(out: Path, name: str, kind: str, case: bytes) -> str:
    path = out / name / f"{kind}-{hashlib.sha256(case).hexdigest()[:12]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(case)
    return str(path)


# ------------------------------------------------------------------------------------------------- the process watched


def _child(options: argparse.Namespace) -> int:
    targets = importlib.import_module("targets")
    mutations = importlib.import_module("mutations")
    seeds = [path.read_bytes() for path in sorted((CORPUS / options.child).iterdir())]
    runner = _Runner(options, targets, Found(options.child))
    if options.engine == "atheris":
        return _atheris(options, runner)
    for seed in seeds:
        runner(seed)
    runner.settle()
    rng = random.Random(options.seed)
    end = time.monotonic() + (options.seconds if options.cases is None else 1e9)
    while time.monotonic() < end and (options.cases is None or runner.found.cases < options.cases):
        runner(mutations.mutate(rng.choice(seeds), seeds, rng))
    runner.finish()
    return 0


class _Runner:
    """Runs cases, and tells the watching process which one it is at."""

    def __init__(self, options: argparse.Namespace, targets: Any, found: Found) -> None:
        self.found = found
        self._run, self._out = targets.run, options.out
        self._idle = 0
        descriptor = os.open(options.state, os.O_RDWR)
        self._state = mmap.mmap(descriptor, 0)
        os.close(descriptor)

    def __call__(self, case: bytes) -> None:
        """Run one case."""
        case = case[:MAX_CASE]
        self._state[_STATE.size : _STATE.size + len(case)] = case
        self.found.cases += 1
        _STATE.pack_into(self._state, 0, self.found.cases, len(case), bool(self._idle))
        begun = time.perf_counter()
        try:
            self.found.accepted += bool(self._run(self.found.target, case))
        except BaseException as error:  # noqa: BLE001 - a panic of a library in Rust is a BaseException
            self._note(error, case)
        seconds = time.perf_counter() - begun
        if self._idle and seconds > self.found.slowest:
            self.found.slowest = seconds
            self.found.slowest_sha256 = hashlib.sha256(case).hexdigest()

    def _note(self, error: BaseException, case: bytes) -> None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {str(error)[:120]}"
        place = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
        if not any(known.startswith(place) for known in self.found.crashes):
            self.found.crashes[kind] = _keep(self._out, self.found.target, "crash", case)

    def settle(self) -> None:
        """Take the seeds' memory as idle, since they import everything, and limit what comes on top."""
        from compress.limits import limit
        from compress.validation.protocol import peak_rss_bytes

        limit(1e6, MEMORY_BYTES)
        self._idle = peak_rss_bytes()

    def finish(self) -> None:
        """Tell what was found."""
        from compress.validation.protocol import peak_rss_bytes

        self.found.peak_bytes = max(0, peak_rss_bytes() - self._idle)
        print(json.dumps(asdict(self.found)), flush=True)


def _atheris(options: argparse.Namespace, runner: _Runner) -> int:
    """Let atheris (libFuzzer) choose the cases; what it crashes by is noted as elsewhere, and does not end it."""
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        print("atheris is not installed: pip install 'compress-slm[fuzz]' (Linux)", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=["compress"]):
        for seed in sorted((CORPUS / options.child).iterdir()):
            runner(seed.read_bytes())
    runner.settle()
    end = time.monotonic() + options.seconds

    def case(data: bytes) -> None:
        runner(data)
        if time.monotonic() > end or (options.cases is not None and runner.found.cases >= options.cases):
            runner.finish()
            sys.stdout.flush()
            os._exit(0)

    words = [sys.argv[0], f"-seed={options.seed + 1}", "-rss_limit_mb=0", f"-max_len={MAX_CASE}", "-len_control=0"]
    atheris.Setup([*words, str(CORPUS / options.child)], case)
    atheris.Fuzz()
    return 0


# ------------------------------------------------------------------------------------------------------------- telling


def _row(found: Found) -> str:
    lines = [f"{found.target}: {found.cases} cases, {len(found.crashes)} crashes, {len(found.hangs)} hangs"]
    lines += [f"  {kind}\n    {path}" for kind, path in found.crashes.items()]
    lines += [f"  hang: {path}" for path in found.hangs]
    return "\n".join(lines)


def _table(results: Sequence[Found]) -> str:
    head = "| target | cases | accepted | crashes | hangs | slowest case (s) | peak memory (MB) |"
    rows = [
        f"| {found.target} | {found.cases:,} | {found.accepted:,} | {len(found.crashes)} | {len(found.hangs)} | "
        f"{found.slowest:.3f} | {found.peak_bytes / 1e6:.0f} |"
        for found in results
    ]
    cases, crashes, hangs = (
        sum(counts) for counts in zip(*((f.cases, len(f.crashes), len(f.hangs)) for f in results), strict=True)
    )
    rows.append(f"| all | {cases:,} | {sum(f.accepted for f in results):,} | {crashes} | {hangs} | | |")
    return "\n".join([head, "|---|---:|---:|---:|---:|---:|---:|", *rows])


if __name__ == "__main__":
    sys.exit(main())
