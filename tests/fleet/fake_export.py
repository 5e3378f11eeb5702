"""Stands in for ``compress export``: does what ``MODEL/told.json`` says, in a tenth of a second, and no more.

``told.json``: profile -> ``seconds`` to take; ``fail`` attempts that end with code 1 first, or ``die`` by SIGKILL;
``report``, the report to leave. Starts and ends are lines of ``MODEL/events``. The standard library only.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    words = sys.argv[2:]
    model, profile, output = Path(words[1]), words[words.index("--profile") + 1], Path(words[words.index("-o") + 1])
    told = json.loads((model / "told.json").read_text())[profile]

    def event(kind: str) -> None:
        with (model.parent / "events").open("a") as stream:
            stream.write(f"{time.monotonic()} {kind} {output.name} {os.getpid()}\n")

    before = (model.parent / "events").read_text() if (model.parent / "events").exists() else ""
    attempts = before.count(f" start {output.name} ")
    event("start")
    time.sleep(told.get("seconds", 0.0))
    if attempts < told.get("die", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if attempts < told.get("fail", 0):
        event("end")
        print("error: it cannot be\n  in: somewhere\n  try: something else", file=sys.stderr)
        return 1
    if "code" in told:
        print("error: it was not to be", file=sys.stderr)
        return int(told["code"])
    partial = output.with_name(f".{output.name}.partial-x")
    partial.mkdir(parents=True)
    (partial / "model.bin").write_bytes(b"weights" * told.get("size", 10))
    if "report" in told:
        (partial / "report.json").write_text(json.dumps(told["report"]))
    (partial / "manifest.json").write_text(json.dumps(_manifest(partial, told.get("report"))))
    event("end")
    partial.rename(output)
    return 0


def _manifest(directory: Path, report: dict | None) -> dict:  # type: ignore[type-arg]
    contents = {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
    files = [
        {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    ]
    status = "built" if report is None else {"pass": "accepted", "fail": "rejected"}[report["verdict"]["status"]]
    source = {"kind": "directory", "id": "fake", "revision": None, "files": []}
    return {
        "schema_version": 1, "status": status, "source": source, "profile": {}, "seed": 0, "tools": {}, "files": files,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
