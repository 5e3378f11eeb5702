"""Workers that need PyTorch, forked from one process that has imported it: the import takes them five seconds each.

A forked worker is a process like the real one: its own group, log, variables and arguments, the same protocol of files.
What differs is that its imports are there. Tests of the protocol, of determinism across processes and the end-to-end
tests start real ones (the fixture ``real_workers``).

As a program, ``python forked_workers.py PARENT``, it is that process: a line of JSON in on standard input (``module``,
``job``, ``environment``, ``place`` to run in),
the new process's number out; when a worker has ended, ``JOB/ended`` has its exit status.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

#: Worker modules that import PyTorch.
MODULES = frozenset(
    f"compress.{name}"
    for name in (
        "calibrate.decoder_worker",
        "calibrate.encoder_worker",
        "calibrate.self_text_worker",
        "prune.distill_worker",
        "prune.worker",
        "validation.encoder_reference",
        "validation.reference",
        "validation.tokenization",
    )
)
_POLL_SECONDS = 0.01
_ENDED = "ended"


class Forked:
    """As much of :class:`subprocess.Popen` as ``compress.validation.protocol`` uses."""

    def __init__(self, pid: int, status: Path) -> None:
        self.pid, self._status = pid, status
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, as :meth:`subprocess.Popen.wait` does."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            with contextlib.suppress(FileNotFoundError):
                self.returncode = int(self._status.read_text())
                break
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(_POLL_SECONDS)
        assert self.returncode is not None
        return self.returncode


class Starter:
    """Stands in for the module ``subprocess`` in ``compress.validation.protocol``."""

    DEVNULL, STDOUT, TimeoutExpired = subprocess.DEVNULL, subprocess.STDOUT, subprocess.TimeoutExpired

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self.forked: list[str] = []

    def Popen(self, command: Sequence[str], *, env: Mapping[str, str], **how: Any) -> Any:
        """Fork a worker that this Python would run, start any other process."""
        if list(command[:3]) != [sys.executable, "-P", "-m"] or command[3] not in MODULES:
            return subprocess.Popen(command, env=env, **how)
        self.forked.append(command[3])
        job = Path(command[4])
        request = json.dumps(
            {"module": command[3], "job": str(job), "environment": dict(env), "place": str(Path.cwd())}
        )
        server = self._running()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(request + "\n")
        server.stdin.flush()
        return Forked(int(server.stdout.readline()), job / _ENDED)

    def _running(self) -> subprocess.Popen[str]:
        if self._server is None:
            command = [sys.executable, str(Path(__file__).resolve()), str(os.getpid())]
            # A thread each before the fork, and none left over: libraries make theirs when they are imported.
            single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
            self._server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | single
            )
        return self._server

    def close(self) -> None:
        """End the process that forks, if there is one."""
        if self._server is not None:
            self._server.communicate(timeout=60)


@contextlib.contextmanager
def forked_workers() -> Iterator[Starter]:
    """Let workers be forked."""
    starter = Starter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.validation.protocol.subprocess", starter)
        yield starter
    starter.close()


# ---------------------------------------------------------------------------------------------- the process that forks


def _serve(parent: int) -> None:
    from compress.validation.protocol import die_with_parent

    die_with_parent(parent)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    _import()
    jobs: dict[int, Path] = {}
    for line in _lines(jobs):
        request = json.loads(line)
        assert len(list(Path("/proc/self/task").iterdir())) == 1, "only the forking thread is there after a fork"
        pid = os.fork()
        if pid == 0:
            _run(request)
        jobs[pid] = Path(request["job"])
        answers.write(f"{pid}\n")
        answers.flush()


def _import() -> None:
    import transformers

    for name in ("AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "BertModel", "LlamaForCausalLM"):
        getattr(transformers, name)  # each is a module that is imported when it is asked for


def _lines(jobs: dict[int, Path]) -> Iterator[str]:
    """Yield requests; between them, note which workers have ended."""
    waiting = b""
    while True:
        _reap(jobs)
        if select.select([0], [], [], _POLL_SECONDS)[0]:
            read = os.read(0, 1 << 20)
            if not read:
                return
            *lines, waiting = (waiting + read).split(b"\n")
            yield from (line.decode() for line in lines)


def _reap(jobs: dict[int, Path]) -> None:
    while jobs:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        job = jobs.pop(pid)
        with contextlib.suppress(FileNotFoundError):  # its test did not wait
            (job / f"{_ENDED}.part").write_text(str(os.waitstatus_to_exitcode(status)))
            (job / f"{_ENDED}.part").rename(job / _ENDED)


def _run(request: Mapping[str, Any]) -> NoReturn:
    """Be the worker: what ``python -P -m MODULE JOB PARENT`` does."""
    code = 1
    try:
        os.setsid()
        log = os.open(Path(request["job"]) / "log", os.O_WRONLY | os.O_APPEND)
        for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(source, target)
        os.chdir(request["place"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.path[0:1] = request["environment"]["PYTHONPATH"].split(os.pathsep)
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        worker = importlib.import_module(request["module"])
        code = worker.serve(worker.handle, [request["job"], str(os.getppid())])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
