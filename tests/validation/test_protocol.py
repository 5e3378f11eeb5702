"""A worker that crashes, hangs or talks nonsense is an error with its log, never the end of the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress.contracts import Runtime
from compress.errors import CompressError, ProviderError, UsageError, WorkerError
from compress.validation import protocol

STAND_IN = """#!{python}
import json, os, pathlib, signal, sys, time
job = pathlib.Path(sys.argv[4])
print("line before the end")
{body}
"""


def stand_in(tmp_path: Path, body: str) -> str:
    """Write an executable that is started in place of the interpreter; ``job`` is its directory."""
    path = tmp_path / "interpreter"
    path.write_text(STAND_IN.format(python=sys.executable, body=body))
    path.chmod(0o755)
    return str(path)


def ask(interpreter: str, timeout: float = 20) -> protocol.Json:
    request = {"model": "some.onnx", "jobs": []}
    return protocol.run_worker("worker", request, timeout=timeout, runtime=Runtime((interpreter,)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed with SIGSEGV"),
        ("sys.exit(3)", "ended with code 3 and no answer"),
        ("(job / 'response.json').write_text('{')", "answered nonsense"),
        ("(job / 'response.json').write_text('[]')", "does not speak protocol 1"),
        ("(job / 'response.json').write_text(json.dumps({'protocol': 99}))", "does not speak protocol 1"),
        ("(job / 'response.json').write_text(json.dumps({'protocol': 1, 'status': 'ok'}))", "without results"),
        ("(job / 'response.json').write_text(json.dumps({'protocol': 1, 'status': 'error'}))", "without saying how"),
    ],
)
def test_a_broken_worker_is_an_error_that_shows_its_log(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(WorkerError, match=message) as caught:
        ask(stand_in(tmp_path, body))
    assert caught.value.where == "some.onnx"
    assert "line before the end" in str(caught.value.hint)


def test_a_good_answer_comes_back_with_the_log(tmp_path: Path) -> None:
    body = "(job / 'response.json').write_text(json.dumps({'protocol': 1, 'status': 'ok', 'results': [7]}))"
    response = ask(stand_in(tmp_path, body))
    assert response["results"] == [7] and "line before the end" in response["log"]


def test_a_hang_is_killed_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "child"
    body = (
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    with pytest.raises(WorkerError, match="hung: no answer within 1.5 s"):
        ask(stand_in(tmp_path, body), timeout=1.5)
    assert time.monotonic() - start < 10
    assert gone(int(pid_file.read_text()))


def gone(pid: int) -> bool:
    """Whether a process has ended (or is a zombie) within 5 seconds."""
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        try:
            if status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = (
        "import os, sys, time, pathlib\n"
        "from compress.validation import protocol\n"
        "protocol.die_with_parent(os.getppid())\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    outer = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {script!r}])"
    root = str(Path(protocol.__file__).parents[2])
    parent = subprocess.Popen([sys.executable, "-c", outer], env={**os.environ, "PYTHONPATH": root})
    for _ in range(200):
        if pid_file.exists() and pid_file.read_text():
            break
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(int(pid_file.read_text()))


def test_an_interpreter_that_is_missing_is_named() -> None:
    with pytest.raises(WorkerError, match="did not start") as caught:
        ask("/nowhere/python")
    assert caught.value.where == "/nowhere/python"


def test_a_compress_error_keeps_its_class_across_the_process() -> None:
    with pytest.raises(UsageError, match="unknown provider 'cpv'") as caught:
        protocol.run_worker("worker", {"model": "x", "provider": "cpv", "jobs": []}, timeout=30)
    assert caught.value.hint == "did you mean cpu?"
    request = {"model": __file__, "provider": "cpu", "threads": 1, "jobs": []}
    with pytest.raises(ProviderError, match="cannot load the model"):
        protocol.run_worker("worker", request, timeout=30)


def test_an_unexpected_exception_is_a_worker_error_with_a_trace() -> None:
    with pytest.raises(WorkerError, match="KeyError: 'provider'") as caught:
        protocol.run_worker("worker", {"model": "x"}, timeout=30)
    assert "Traceback" in str(caught.value.hint)


def test_a_module_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(WorkerError, match="no answer") as caught:
        protocol.run_worker("nothing", {}, timeout=30)
    assert "No module named" in str(caught.value.hint)


def test_the_child_sees_the_threads_and_no_hub(tmp_path: Path) -> None:
    body = (
        "names = ['OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'HF_HUB_OFFLINE']\n"
        "answer = {'protocol': 1, 'status': 'ok', 'results': [os.environ[name] for name in names]}\n"
        "(job / 'response.json').write_text(json.dumps(answer))"
    )
    response = protocol.run_worker("worker", {"threads": 3}, timeout=20, runtime=Runtime((stand_in(tmp_path, body),)))
    assert response["results"] == ["3", "3", "1"]


def test_progress_is_passed_on(tmp_path: Path) -> None:
    body = (
        "(job / 'progress').write_text('0.25'); time.sleep(0.5)\n"
        "(job / 'progress').write_text('0.75'); time.sleep(0.5)\n"
        "(job / 'response.json').write_text(json.dumps({'protocol': 1, 'status': 'ok', 'results': []}))"
    )
    seen: list[float] = []
    protocol.run_worker("worker", {}, timeout=20, runtime=Runtime((stand_in(tmp_path, body),)), progress=seen.append)
    assert seen == [0.25, 0.75]


def test_the_job_directory_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(protocol.tempfile, "tempdir", None)
    with pytest.raises(CompressError):
        protocol.run_worker("nothing", {}, timeout=30)
    assert list(tmp_path.iterdir()) == []


def test_a_large_parent_does_not_raise_the_childs_peak() -> None:
    ballast = bytearray(300 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from compress.validation.protocol import peak_rss_bytes as p; print(p())"
    root = str(Path(protocol.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    small = int(subprocess.check_output([sys.executable, "-c", code], env=environment))
    grown = "b = bytearray(100 << 20); b[::4096] = b'x' * len(b[::4096]); " + code
    large = int(subprocess.check_output([sys.executable, "-c", grown], env=environment))
    assert small < 100 << 20 < large < 200 << 20 < len(ballast)
