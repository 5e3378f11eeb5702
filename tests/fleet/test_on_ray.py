"""Sweeps on Ray: the same digests as in turn, a worker killed midway, and what is told where Ray cannot be had."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fleet_desk import FAKE, Desk

import compress
from compress.errors import UsageError
from compress.fleet.on_ray import OUTPUT, Answer, Request, work
from compress.package import manifest
from tiny_models import PLAIN_INT8

ROOT = Path(compress.__file__).parent.parent


def test_ray_is_imported_only_when_asked_for(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.model("a")
    grid = desk.write("a")
    program = "import sys, compress.fleet.on_ray, compress.api; print('ray' in sys.modules, 'fsspec' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError) as caught:
        compress.sweep(grid, desk.output, ray="local")
    assert (caught.value.what, caught.value.hint) == ("Ray is not installed", "pip install 'compress-slm[ray]'")
    with pytest.raises(UsageError, match="memory:// lives in one process"):
        compress.sweep(grid, "memory://bucket", ray="local")
    assert desk.starts() == []


def test_what_a_task_does(desk: Desk) -> None:
    """Without a cluster: the function that Ray runs, with what travels to it and back."""
    desk.model("a", x86_int8={"code": 1})

    def asked(profile: str, **other: object) -> Answer:
        words = ("export", str(desk.place / "a"), "--profile", profile, "-o", OUTPUT)
        told = {"launcher": FAKE, "words": words, "threads": 1, "attempt": 1, "versions": manifest.tool_versions()}
        request = Request(f"a-{profile}", str(desk.output), **{**told, **other})  # type: ignore[arg-type]
        return pickle.loads(pickle.dumps(work(pickle.loads(pickle.dumps(request)))))  # type: ignore[no-any-return]

    done = asked("arm-int4")
    assert done.ended.code == 0 and done.outcome is not None and done.ended.machine == os.uname().nodename
    assert done.log == f"$ compress {shlex.join(['export', str(desk.place / 'a'), '--profile', 'arm-int4'])} -o " + (
        f"{desk.output / 'a-arm-int4'}  # attempt 1\n"
    )
    again = asked("arm-int4")  # as after a worker that died when the artifact was there
    assert again.outcome == done.outcome and again.ended.seconds is None and desk.starts() == ["a-arm-int4"]
    failed = asked("x86-int8")
    assert (failed.ended.code, failed.ended.error, failed.outcome) == (1, "it was not to be", None)
    other = asked("arm-int4", versions={**manifest.tool_versions(), "numpy": "0"})
    assert other.outcome is None and "this node has numpy" in (other.ended.error or "")


# ------------------------------------------------------------------------------------------------------ a real cluster


def exports() -> Iterator[tuple[int, int, str]]:
    """Yield number, parent and job of every export that a Ray worker of this test has started."""
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            if folder.name.isdigit() and any(word.endswith("quick_export.py") for word in words):
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                yield int(folder.name), int(parent), words[words.index("-o") + 1]
        except (OSError, ValueError, UnicodeDecodeError):
            continue  # it has ended meanwhile


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_of_two_workers_one_of_which_is_killed(
    quick: Callable[..., None], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    names = ("llama", "mistral", "bert:embedding")
    quick(*names)
    models = [f'{{model = "{tiny_model(name)}", name = "{name.partition(":")[0]}"}}' for name in names]
    profiles = ['"arm-int4"', '"x86-int4"', f'{{profile = "{PLAIN_INT8}", name = "plain"}}']
    grid = tmp_path / "grid.toml"
    grid.write_text(f"models = [{', '.join(models)}]\nprofiles = [{', '.join(profiles)}]\nvalidate = false\n")
    in_turn = compress.sweep(grid, tmp_path / "in-turn")
    assert len(in_turn.jobs) == 9 and in_turn.exit_code == 0

    output = tmp_path / "on-ray"
    command = [sys.executable, str(Path(__file__).with_name("quick_sweep.py")), "sweep", str(grid), "-o", str(output)]
    process = subprocess.Popen(
        [*command, "--ray", "local", "--jobs", "2", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    seen: dict[str, set[int]] = {}
    killed, most = None, 0
    try:
        deadline = time.monotonic() + 400
        while process.poll() is None and time.monotonic() < deadline:
            running = [item for item in exports() if item[2].startswith(str(output))]
            most = max(most, len(running))
            for number, parent, job in running:
                seen.setdefault(job, set()).add(number)
                if killed is None and len(seen) == 3:
                    assert (Path("/proc") / str(parent) / "cmdline").read_bytes().startswith(b"ray::")
                    os.kill(parent, signal.SIGKILL)
                    killed = job
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert killed is not None and len(seen[killed]) == 2 and most == 2, (seen, most)
    assert {job["name"]: job["outcome"]["digest"] for job in found["jobs"]} == {
        job.name: job.outcome.digest for job in in_turn.jobs if job.outcome
    }
    assert len({job["outcome"]["digest"] for job in found["jobs"]}) == 9
    for job in found["jobs"]:
        assert "# attempt 1\n" in (output / "logs" / f"{job['name']}.log").read_text()
        assert job["machine"] == os.uname().nodename and job["predicted_peak_bytes"] > 0
    assert not list(exports())
