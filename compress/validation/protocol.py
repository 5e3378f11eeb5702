"""How the main process talks to a worker: one request file, one response file, a log, and a process group.

Runtimes exclude each other and can crash, so each run of a model happens in a process of its own, possibly with another
interpreter. The worker reads ``request.json``, writes ``response.json`` (atomically, last), and may write ``progress``.
Whatever it prints goes to ``log``. A crash, a hang and a nonsense answer become a :class:`WorkerError` that shows the
end of that log; a :class:`CompressError` raised inside the worker is raised again here with its class.

This module is read by foreign interpreters: the standard library and numpy only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import errors
from compress.contracts import Runtime
from compress.errors import CompressError, WorkerError

PROTOCOL_VERSION = 1
POLL_SECONDS = 0.05
LOG_TAIL_LINES = 12
LOG_TAIL_BYTES = 4096

Json = dict[str, Any]
Handler = Callable[[Json, Path], Json]


@dataclass(frozen=True)
class CheckpointSpec:
    """How a worker opens the source model again: what ``compress.source.open_checkpoint`` takes."""

    reference: str
    adapter: Path | None = None
    revision: str | None = None
    task: str | None = None

    def as_request(self) -> Json:
        """Return it as the workers take it."""
        adapter = None if self.adapter is None else str(self.adapter)
        return {"reference": self.reference, "adapter": adapter, "revision": self.revision, "task": self.task}


# --------------------------------------------------------------------------------------------------- main process


def run_worker(
    module: str,
    request: Mapping[str, Any],
    *,
    timeout: float,
    runtime: Runtime | None = None,
    progress: Callable[[float], None] | None = None,
) -> Json:
    """Run ``compress.validation.<module>`` (with a dot: ``compress.<module>``) in its own process; return its answer.

    Args:
        module: The worker module's name.
        request: A JSON-able mapping; ``threads`` (int, default 1) also sets the child's OpenMP threads.
        timeout: Seconds after which the worker and everything it started is killed.
        runtime: The Python to run it with; this one by default.
        progress: Called with a fraction in 0..1 whenever the worker reports one.

    Returns:
        The response: ``results``, ``load_seconds``, ``peak_rss_bytes``, ``placement``, ``versions``, ``log`` (its end).

    Raises:
        WorkerError: It could not start, crashed, hung, or answered nonsense.
        CompressError: What the worker raised, by its class.
    """
    with tempfile.TemporaryDirectory(prefix="compress-worker-") as place:
        job = Path(place)
        _link_package(job)
        (job / "request.json").write_text(json.dumps({**request, "protocol": PROTOCOL_VERSION}))
        started = runtime or Runtime((sys.executable,))
        command = [
            *started.command,
            "-P",
            "-m",
            f"compress.{module if '.' in module else f'validation.{module}'}",
            str(job),
            str(os.getpid()),
        ]
        with (job / "log").open("wb") as log:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_child_environment(job, int(request.get("threads", 1)), started.environment),
                    start_new_session=True,
                )
            except OSError as error:
                raise WorkerError(f"the worker did not start: {error.strerror}", where=started.command[0]) from error
            try:
                finished = _wait(process, job, timeout, progress)
            finally:
                _kill_group(process)
        tail = log_tail(job / "log")
        if not finished:
            raise WorkerError(
                f"the {module} worker hung: no answer within {timeout:g} s", where=_subject(request), hint=_shown(tail)
            )
        return _read_response(module, request, job, process.returncode, tail)


def log_tail(path: Path) -> str:
    """Return the last lines of a log, at most 4 KiB."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])


def _wait(
    process: subprocess.Popen[bytes], job: Path, timeout: float, progress: Callable[[float], None] | None
) -> bool:
    """Return whether the process ended within ``timeout`` seconds, passing its progress on."""
    deadline = time.monotonic() + timeout
    shown = -1.0
    while time.monotonic() < deadline:
        try:
            process.wait(POLL_SECONDS)
            return True
        except subprocess.TimeoutExpired:
            if progress is not None:
                with contextlib.suppress(OSError, ValueError):
                    fraction = float((job / "progress").read_text())
                    if fraction != shown:
                        shown = fraction
                        progress(fraction)
    return False


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the worker and its children; harmless when they have ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _link_package(job: Path) -> None:
    """Make this very package importable for any interpreter, and nothing that lies beside it."""
    (job / "path").mkdir()
    (job / "path" / "compress").symlink_to(Path(errors.__file__).resolve().parent, target_is_directory=True)


def _child_environment(job: Path, threads: int, own_variables: Mapping[str, str]) -> dict[str, str]:
    """Return the worker's variables: ours stand over the runtime's, and those over what this process has.

    A runtime's ``PYTHONPATH`` replaces the inherited one, which is for another Python; this package still comes first.
    """
    environment = {**os.environ, **own_variables}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(max(1, threads))
    own = str(job / "path")
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = f"{own}{os.pathsep}{inherited}" if inherited else own
    environment.update(
        HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1"
    )
    return environment


def _subject(request: Mapping[str, Any]) -> str | None:
    subject = request.get("model") or request.get("reference")
    return None if subject is None else str(subject)


def _shown(tail: str) -> str | None:
    return f"the end of its log:\n{tail}" if tail else None


def _read_response(module: str, request: Mapping[str, Any], job: Path, code: int, tail: str) -> Json:
    where = _subject(request)
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        killed = ": out of memory, or somebody killed it" if name == "SIGKILL" else ""
        raise WorkerError(f"the {module} worker crashed with {name}{killed}", where=where, hint=_shown(tail))
    try:
        response = json.loads((job / "response.json").read_text())
    except FileNotFoundError:
        raise WorkerError(
            f"the {module} worker ended with code {code} and no answer", where=where, hint=_shown(tail)
        ) from None
    except ValueError as error:
        raise WorkerError(f"the {module} worker answered nonsense: {error}", where=where, hint=_shown(tail)) from error
    if not isinstance(response, dict) or response.get("protocol") != PROTOCOL_VERSION:
        raise WorkerError(
            f"the {module} worker does not speak protocol {PROTOCOL_VERSION}", where=where, hint=_shown(tail)
        )
    if response.get("status") == "error":
        raise _rebuilt(module, response.get("error"), where, tail)
    if response.get("status") != "ok" or not isinstance(response.get("results"), list):
        raise WorkerError(f"the {module} worker answered without results", where=where, hint=_shown(tail))
    response["log"] = tail
    return response


def _rebuilt(module: str, error: object, where: str | None, tail: str) -> CompressError:
    """Turn a worker's error back into the exception it was; an unexpected one is a WorkerError."""
    if not isinstance(error, dict) or not isinstance(error.get("what"), str):
        return WorkerError(f"the {module} worker failed without saying how", where=where, hint=_shown(tail))
    known = getattr(errors, str(error.get("class")), None)
    if isinstance(known, type) and issubclass(known, CompressError):
        return known(error["what"], where=error.get("where"), hint=error.get("hint"))
    return WorkerError(f"the {module} worker failed: {error['what']}", where=where, hint=_shown(tail))


# --------------------------------------------------------------------------------------------------- worker process


def serve(handler: Handler, arguments: list[str] | None = None) -> int:
    """Answer one request: the ``main`` of every worker module.

    Args:
        handler: Takes the request and the job directory, returns the response without ``protocol`` and ``status``.
        arguments: The job directory and the parent's process id; ``sys.argv[1:]`` by default.

    Returns:
        The exit status: 0 also for an error that was answered.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 2:
        print("this module is a worker of compress and is started by it", file=sys.stderr)
        return errors.EXIT_USAGE
    job, parent = Path(given[0]), int(given[1])
    die_with_parent(parent)
    request = json.loads((job / "request.json").read_text())
    response: Json
    try:
        if request.get("protocol") != PROTOCOL_VERSION:
            raise WorkerError(f"the request is in protocol {request.get('protocol')}, not {PROTOCOL_VERSION}")
        response = {"status": "ok", **handler(request, job)}
    except CompressError as error:
        detail = {"class": type(error).__name__, "what": error.what, "where": error.where, "hint": error.hint}
        response = {"status": "error", "error": detail}
    except Exception as error:  # noqa: BLE001 - whatever went wrong in a runtime is an answer, with its trace in the log
        traceback.print_exc()
        response = {"status": "error", "error": {"class": None, "what": f"{type(error).__name__}: {error}"}}
    response["protocol"] = PROTOCOL_VERSION
    partial = job / "response.json.part"
    partial.write_text(json.dumps(response))
    partial.replace(job / "response.json")
    return 0


def report_progress(job: Path, fraction: float) -> None:
    """Tell the main process how far the work is, 0..1."""
    partial = job / "progress.part"
    partial.write_text(f"{fraction:.4f}")
    partial.replace(job / "progress")


def peak_rss_bytes() -> int:
    """Return this process's largest resident set so far, in bytes, as the kernel counted it.

    ``VmHWM`` belongs to the address space and starts anew at ``exec``. ``getrusage`` does not: a child forked by a
    large parent begins with the parent's peak. It is the fallback where there is no ``/proc``.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def die_with_parent(parent: int) -> None:
    """Ask the kernel to end this process with its parent (Linux); leave at once if it is already gone."""
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(errors.EXIT_FAILED)
