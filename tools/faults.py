"""Exports on a disk that fills up, and from a disk that fails: every error is clear, and nothing is left.

    python tools/faults.py MODEL PROFILE [--points 20] [-- EXPORT OPTIONS]

A small library (tools/faults.c, compiled by ``cc``) counts the bytes that an export and its workers write beside the
output and in ``TMPDIR``, or read from the model. After an undisturbed run that tells how many there are, runs get less
and less room: at each of the points, evenly spread, every further write fails with ENOSPC, or every further read with
EIO. A run passes that ends with exit code 1 and one to three lines that are no traceback, with nothing left beside the
output, nothing in ``TMPDIR``, and no output.
"""

from __future__ import annotations

import argparse
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".c")
_LINES = 3
#: What a full disk and a failed read are called, in any of the ways the system or this program says it.
SPACE, READING = ("space", "No room"), ("read", "Input/output error", "I/O error")


@dataclass(frozen=True)
class Outcome:
    """How a run with a fault ended: its exit code, what it said, what it left."""

    code: int
    said: str
    left: tuple[str, ...]

    def faults(self, words: Sequence[str]) -> list[str]:
        """Return what is wrong with it; ``words`` are what the message may call the fault."""
        lines = [line for line in self.said.splitlines() if line and not line.startswith("note: ")]
        found = [f"exit code {self.code}"] if self.code != 1 else []
        found += ["a traceback"] if "Traceback" in self.said else []
        found += [f"{len(lines)} lines"] if not 1 <= len(lines) <= _LINES else []
        found += ["no error line"] if not lines or not lines[0].startswith("error: ") else []
        found += ["the fault is not named"] if not any(word in self.said for word in words) else []
        return found + [f"left: {name}" for name in self.left]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run at every point; return 1 where a run did not end as it should."""
    given_words = list(sys.argv[1:] if arguments is None else arguments)
    options = given_words[given_words.index("--") + 1 :] if "--" in given_words else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("profile")
    parser.add_argument("--points", type=int, default=20)
    given = parser.parse_args(given_words[: given_words.index("--")] if "--" in given_words else given_words)
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        library = compile_library(Path(place))
        words = [str(given.model), "--profile", given.profile, *options]
        first, written, read = run(library, words, Path(place), model=given.model)
        if first.code not in (0, 3):
            raise SystemExit(f"an undisturbed run ended with {first.code}: {first.said}")
        print(f"undisturbed: {written:,} bytes written, {read:,} read")
        for kind, total, names in (("ENOSPC", written, SPACE), ("EIO", read, READING)):
            for point in range(given.points):
                after = total * (2 * point + 1) // (2 * given.points)
                limits = {"FAULT_LIMIT": str(after)} if kind == "ENOSPC" else {"FAULT_READ_AFTER": str(after)}
                outcome, _, _ = run(library, words, Path(place), limits, model=given.model)
                faults = outcome.faults(names)
                wrong += bool(faults)
                print(f"{kind} after {after:,} bytes: {'; '.join(faults) or 'as it should'}")
                print("    " + outcome.said.strip().replace("\n", "\n    "), flush=True)
    print(f"{2 * given.points} points, {wrong} wrong")
    return 1 if wrong else 0


def compile_library(place: Path) -> Path:
    """Compile the library; return its path."""
    library = place / "faults.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("a C compiler is needed")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, _SOURCE, "-ldl"], check=True)
    return library


def run(
    library: Path, words: Sequence[str], place: Path, limits: Mapping[str, str] | None = None, *, model: Path
) -> tuple[Outcome, int, int]:
    """Export under the library; return how it ended, and the bytes written and read."""
    with tempfile.TemporaryDirectory(dir=place, prefix="run-") as room:
        root, counter = Path(room) / "room", Path(room) / "counter"
        (root / "temporary").mkdir(parents=True)
        (root / "place").mkdir()
        counter.write_bytes(bytes(16))
        output = root / "place" / "artifact"
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(root / "temporary"),
            "LD_PRELOAD": str(library),
            "FAULT_DIRECTORY": str(root),
            "FAULT_COUNTER": str(counter),
            "FAULT_READ": str(model.resolve()),
            **(limits or {}),
        }
        command = [sys.executable, "-m", "compress", "export", *words, "-o", str(output)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
        kept = {output.name} if done.returncode in (0, 3) else set()
        left = [path.name for path in (root / "place").iterdir() if path.name not in kept]
        left += [f"TMPDIR/{path.name}" for path in (root / "temporary").iterdir()]
        written, read = struct.unpack("qq", counter.read_bytes())
        return Outcome(done.returncode, done.stderr, tuple(left)), written, read


if __name__ == "__main__":
    sys.exit(main())
