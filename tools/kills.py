"""Kill exports at random moments, repeat the command, and compare what comes out with an undisturbed run's bytes.

    python tools/kills.py MODEL PROFILE [MODEL PROFILE]... [--kills 50] [--seed 0] [--again 1] [-- EXPORT OPTIONS]

Each trial starts ``compress export``, kills that process with SIGKILL after a random time (uniform over an undisturbed
run's), ``--again`` times, and then lets the same command finish; every second trial sets ``TMPDIR``. It fails where the
last run does not end with 0, where a file differs that does not hold measurements, where anything else is left beside
the output or in ``TMPDIR``, or where a worker lives on. SOURCE_DATE_EPOCH fixes the time in cards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.package.manifest import measured

_SETTLE_SECONDS = 2.0
_ENDED = "ended before"
_ALIVE = ", with a worker that lives on"


@dataclass(frozen=True)
class Case:
    """One export: how it is called, how long it takes, and what it leaves."""

    words: tuple[str, ...]
    seconds: float
    files: dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials; return 1 where one failed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="MODEL PROFILE")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--again", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    if len(given.pairs) % 2:
        parser.error("models and profiles come in pairs")
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        cases = [
            undisturbed((model, "--profile", profile, *options), Path(place) / str(index))
            for index, (model, profile) in enumerate(zip(given.pairs[::2], given.pairs[1::2], strict=True))
        ]
        generator = random.Random(given.seed)  # noqa: S311 - moments, not secrets
        faults: Counter[str] = Counter()
        stages: Counter[str] = Counter()
        for number in range(given.kills):
            case = cases[number % len(cases)]
            moments = [generator.uniform(0, case.seconds) for _ in range(given.again)]
            found, reached = trial(case, moments, Path(place), elsewhere=number % 2 == 1)
            faults.update(found)
            stages.update(reached)
            shown = ", ".join(f"{moment:.2f}" for moment in moments)
            print(f"{number + 1:3} {case.words[0]} killed at {shown} s ({', '.join(reached)}): {found or 'identical'}")
    made = sum(count for name, count in stages.items() if not name.startswith(_ENDED))
    summary = {"kills": made, "trials": given.kills, "faults": faults, "had finished": stages}
    print(json.dumps(summary, indent=2))
    return 1 if faults else 0


def undisturbed(words: tuple[str, ...], place: Path) -> Case:
    """Export twice, for the bytes and for the time when nothing is cold."""
    times = []
    for name in ("first", "whole"):
        start = time.perf_counter()
        finish(words, place / name)
        times.append(time.perf_counter() - start)
    files, first = digests(place / "whole"), digests(place / "first")
    if files != first:
        raise SystemExit(f"{words[0]}: two undisturbed runs differ in {sorted(differing(first, files))}")
    return Case(words, times[-1], files)


def trial(case: Case, moments: Sequence[float], place: Path, *, elsewhere: bool) -> tuple[list[str], list[str]]:
    """Kill at each moment, finish, compare; return what is wrong, and what each kill found finished."""
    with tempfile.TemporaryDirectory(dir=place, prefix="trial-") as room:
        output, temporary = Path(room) / "place" / "artifact", Path(room) / "temporary"
        temporary.mkdir()
        given = temporary if elsewhere else None
        reached = [kill(case.words, output, moment, given) for moment in moments]
        faults = [f"a worker lives on after {item}" for item in reached if _ALIVE in item]
        faults += [item for item in reached if item.startswith(f"{_ENDED} with")]
        try:
            if not output.exists():  # a run may have ended before its moment came
                finish(case.words, output, given)
        except RuntimeError as error:
            return [str(error)], reached
        faults += [f"differs: {name}" for name in differing(case.files, digests(output))]
        beside = [path.name for path in output.parent.iterdir() if path != output]
        faults += [f"left: {name}" for name in (*beside, *(path.name for path in temporary.iterdir()))]
        return faults, reached


def kill(words: Sequence[str], output: Path, moment: float, temporary: Path | None) -> str:
    """Start, kill after a time, wait for its children to end; return the last entry of the journal."""
    process = subprocess.Popen(
        command(words, output),
        env=environment(temporary),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return _ENDED if process.wait(moment) == 0 else f"{_ENDED} with {process.returncode}"
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (alive := living(output)) and time.monotonic() < deadline:
        time.sleep(0.05)
    journal = output.with_name(f".{output.name}.partial") / "journal"
    last = "nothing"
    if journal.is_file():
        lines = journal.read_bytes().splitlines()
        last = json.loads(lines[-1])["name"] if lines and lines[-1].endswith(b"}") else "a torn line"
    return f"{last}{_ALIVE if alive else ''}"


def living(output: Path) -> list[int]:
    """Return processes whose command line names the output's directory."""
    found, wanted = [], os.fsencode(output.parent)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if wanted in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def finish(words: Sequence[str], output: Path, temporary: Path | None = None) -> None:
    """Run the command to its end."""
    done = subprocess.run(
        command(words, output), env=environment(temporary), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr.strip()[-400:]}")


def command(words: Sequence[str], output: Path) -> list[str]:
    """Return the command line."""
    return [sys.executable, "-m", "compress", "export", *words, "-o", str(output)]


def environment(temporary: Path | None) -> dict[str, str]:
    """Return the variables: a fixed time, no hub, and a place for temporary files that can be looked at."""
    own = {"SOURCE_DATE_EPOCH": "1700000000", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **own, **({} if temporary is None else {"TMPDIR": str(temporary)})}


def digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but those that hold measurements, and the manifest that lists them."""
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    timed = any(name == "report.json" for name in found)
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in found.items()
        if not timed or not (measured(name) or name == "manifest.json")
    }


def differing(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Return the names of files that are not the same on both sides."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


if __name__ == "__main__":
    sys.exit(main())
