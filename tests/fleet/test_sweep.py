"""Sweeps on one machine: the journal, memory, failures, the lock, and what is kept of an earlier one."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fleet_desk import Desk, report

import compress
from compress import cli, resources
from compress.errors import CompressError, UsageError
from compress.fleet import journal, local
from compress.fleet.grid import load_grid
from compress.fleet.jobs import make_jobs, predicted_peak
from compress.lock import LockedError
from compress.validation.memory import available_memory
from tiny_models import PLAIN_INT8

MEASURED = {"README.md", "report.html", "report.json", "manifest.json"}


def statuses(found: Any) -> dict[str, str]:
    return {job.name: job.status for job in found.jobs}


def test_two_models_under_two_profiles(desk: Desk) -> None:
    desk.model("a", arm_int4={"report": report(0.3, 50_000_000, 90)}, x86_int8={"report": report(0.01, 99_000_000, 60)})
    desk.model("b", arm_int4={"report": report(0.9, 40_000_000, passed=False)}, x86_int8={"code": 2})
    lines: list[str] = []
    found = compress.sweep(desk.write("a", "b"), desk.output, say=lines.append)
    assert statuses(found) == {
        "a-arm-int4": "accepted", "a-x86-int8": "accepted", "b-arm-int4": "rejected", "b-x86-int8": "failed",
    }  # fmt: skip
    assert found.complete and found.exit_code == 1 and desk.starts() == list(statuses(found))
    assert [(item.what, item.limit_bytes, item.job) for item in found.best if item.model == "a"] == [
        ("smallest", None, "a-arm-int4"),
        ("fastest", None, "a-arm-int4"),
        ("most accurate", 64_000_000, "a-arm-int4"),
        ("most accurate", 128_000_000, "a-x86-int8"),
    ]
    assert not [item for item in found.best if item.model == "b"]
    assert found.jobs[3].error == "it was not to be" and found.jobs[3].attempts == 1  # wrong usage stays wrong
    assert found.jobs[0].seconds and found.jobs[0].predicted_peak_bytes == 1_000
    assert journal.read(desk.output / "sweep.json") == found
    assert {path.name for path in desk.output.iterdir()} == {
        ".sweep.lock", "README.md", "a-arm-int4", "a-x86-int8", "b-arm-int4", "logs", "sweep.html", "sweep.json",
    }  # fmt: skip
    log = (desk.output / "logs" / "b-x86-int8.log").read_text()
    assert log.startswith("$ compress export ") and "# attempt 1\nerror: it was not to be" in log
    assert lines[-1] == "[4/4] b-x86-int8: failed: it was not to be"


@pytest.mark.parametrize(
    ("told", "code"), [({}, 0), ({"code": 3}, 3), ({"code": 4}, 4), ({"code": 1}, 1), ({"code": 2}, 1)]
)
def test_exit_codes(desk: Desk, told: dict[str, Any], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    desk.model("a", arm_int4=told)
    grid = desk.write("a", profiles=("arm-int4",), more="retries = 0")
    assert cli.run(["sweep", str(grid), "-o", str(desk.output), "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["jobs"][0]["name"] == "a-arm-int4" and err == ""


def test_what_is_done_is_not_done_again(desk: Desk) -> None:
    desk.model("a")
    desk.model("b", x86_int8={"fail": 1})
    grid = desk.write("a", "b", more="retries = 0")
    first = compress.sweep(grid, desk.output)
    assert statuses(first)["b-x86-int8"] == "failed" and len(desk.starts()) == 4
    second = compress.sweep(grid, desk.output)
    assert desk.starts()[4:] == ["b-x86-int8"] and statuses(second)["b-x86-int8"] == "built"
    # An artifact that was changed, a source that was changed, a profile that was changed: each is one job's.
    (desk.output / "a-arm-int4" / "model.bin").write_bytes(b"x" * 70)
    compress.sweep(grid, desk.output)
    assert desk.starts()[5:] == ["a-arm-int4"]
    (desk.place / "b" / "more.txt").write_text("new")
    compress.sweep(grid, desk.output)
    assert desk.starts()[6:] == ["b-arm-int4", "b-x86-int8"]
    compress.sweep(desk.write("a", "b", more="seed = 1"), desk.output)
    assert len(desk.starts()) == 12
    # Out of the grid and back: kept.
    compress.sweep(desk.write("a", more="seed = 1"), desk.output)
    assert [job.name for job in journal.read(desk.output / "sweep.json").former] == ["b-arm-int4", "b-x86-int8"]  # type: ignore[union-attr]
    compress.sweep(desk.write("a", "b", more="seed = 1"), desk.output)
    assert len(desk.starts()) == 12
    compress.sweep(grid, desk.output, fresh=True)
    assert len(desk.starts()) == 16


def test_what_no_sweep_has_made_is_left_alone(desk: Desk) -> None:
    desk.model("a")
    grid = desk.write("a")
    precious = desk.output / "a-x86-int8" / "diary"
    precious.parent.mkdir(parents=True)
    precious.write_text("dear")
    with pytest.raises(UsageError, match="a-x86-int8 exists already, and this sweep has not made it"):
        compress.sweep(grid, desk.output, fresh=True)
    assert precious.read_text() == "dear" and desk.starts() == []
    # A journal that claims it does not make it an artifact.
    precious.unlink()
    compress.sweep(grid, desk.output)
    compress_dir = desk.output / "a-x86-int8"
    for path in compress_dir.iterdir():
        path.unlink()
    precious.write_text("dear")
    with pytest.raises(UsageError, match="holds something that is no artifact"):
        compress.sweep(grid, desk.output)
    assert precious.read_text() == "dear"


def test_a_damaged_journal_is_told(desk: Desk) -> None:
    desk.model("a")
    grid = desk.write("a", profiles=("arm-int4",))
    found = compress.sweep(grid, desk.output)
    whole = journal.dumps(found)
    for content, what in (
        (whole[:50], "the journal is damaged"),
        (whole.replace('"a-arm-int4"', '"../a"'), "the journal is damaged: jobs.0.name"),
        (whole.replace('"schema_version": 1', '"schema_version": 2'), "schema version 2"),
    ):
        (desk.output / "sweep.json").write_text(content)
        with pytest.raises(CompressError, match=what):
            compress.sweep(grid, desk.output)
    assert desk.starts() == ["a-arm-int4"]


def test_failures_are_tried_again(desk: Desk) -> None:
    desk.model("a", arm_int4={"fail": 2}, x86_int8={"die": 1})
    lines: list[str] = []
    found = compress.sweep(desk.write("a", more="retries = 2"), desk.output, say=lines.append)
    assert statuses(found) == {"a-arm-int4": "built", "a-x86-int8": "built"}
    assert [job.attempts for job in found.jobs] == [3, 2]
    assert any("ended by SIGKILL: out of memory, or somebody killed it: once more" in line for line in lines)
    again = compress.sweep(desk.write("a", more="retries = 2"), desk.output, retries=0, fresh=True)
    assert again.exit_code == 0  # its failures are used up
    assert (desk.output / "logs" / "a-arm-int4.log").read_text().count("# attempt") == 1


# -------------------------------------------------------------------------------------------------------------- memory


def overlaps(desk: Desk) -> bool:
    """Return whether two jobs ran at once."""
    running = 0
    for _, kind, _ in sorted(desk.events()):
        running += 1 if kind == "start" else -1
        if running > 1:
            return True
    return False


@pytest.mark.parametrize(("limit", "together"), [(1_000_000_000, False), (4_000_000_000, True)])
def test_jobs_that_do_not_fit_together_never_overlap(desk: Desk, limit: int, together: bool) -> None:
    desk.model("a", arm_int4={"seconds": 0.4}, x86_int8={"seconds": 0.4})
    desk.peaks = {"a-arm-int4": 600_000_000, "a-x86-int8": 600_000_000}
    found = compress.sweep(desk.write("a"), desk.output, jobs=2, max_memory=limit)
    assert found.exit_code == 0 and overlaps(desk) is together


def test_a_job_that_does_not_fit_alone_is_refused_before_work(desk: Desk) -> None:
    desk.model("a")
    desk.peaks = {"a-arm-int4": 3_000_000_000}
    found = compress.sweep(desk.write("a"), desk.output, jobs=2, max_memory="2GB")
    assert statuses(found) == {"a-arm-int4": "refused", "a-x86-int8": "built"} and found.exit_code == 1
    assert "it would take 3.00 GB, more than the 1." in (found.jobs[0].error or "")
    assert desk.starts() == ["a-x86-int8"]


def test_each_job_is_held_to_its_share(desk: Desk) -> None:
    desk.model("a")
    desk.peaks = {"a-arm-int4": 1_500_000_000}
    compress.sweep(desk.write("a"), desk.output, jobs=2, max_memory="2GB", threads=3)
    words = (desk.output / "logs" / "a-x86-int8.log").read_text().split()
    share = int(words[words.index("--max-memory") + 1])
    assert 700_000_000 < share < 1_000_000_000 and words[words.index("--threads") + 1] == "3"
    words = (desk.output / "logs" / "a-arm-int4.log").read_text().split()
    assert words[words.index("--max-memory") + 1] == "1500000000"


def test_what_is_available_is_the_limit_where_nobody_says(desk: Desk) -> None:
    from compress.fleet.place import Place

    crew = local.LocalCrew(Place(str(desk.output)), 2, None, None, 0)
    assert crew.memory is not None and crew.memory <= (available_memory() or 0) * 1.2
    assert crew.threads == max(1, local.cores() // 2)


def test_what_does_not_fit_whole_is_counted_in_pieces(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(*arguments: Any) -> resources.Prediction:
        return resources.Prediction(graph=10**8, weights=10**8, validation=3 * 10**9, validation_in_pieces=10**9)

    monkeypatch.setattr(resources, "predict", large)
    grid = {"models": [{"model": str(tiny_model("llama")), "name": "l"}], "profiles": ["arm-int4"]}
    (job,) = make_jobs(load_grid(grid), validate=True)
    found = {limit: predicted_peak(job, 2, limit) for limit in (None, 3 * 10**9, 2 * 10**9)}
    assert found == {None: 3 * 10**9, 3 * 10**9: 3 * 10**9, 2 * 10**9: 10**9}


def test_predictions_are_the_plans(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    models = [
        {"model": str(tiny_model("llama")), "name": "l"},
        {"model": str(tiny_model("bert:embedding")), "name": "e"},
    ]
    grid = {"models": models, "profiles": ["arm-int4", "x86-int8", "nobodys"]}
    made = {job.name: job for job in make_jobs(load_grid(grid), validate=True)}
    plan = compress.plan(tiny_model("llama"), "arm-int4", threads=2).predicted_peak_memory
    assert predicted_peak(made["l-arm-int4"], 2) == max(plan.export, plan.validation)
    bare = {job.name: job for job in make_jobs(load_grid(grid), validate=False)}
    assert predicted_peak(bare["l-arm-int4"], 2) == plan.export
    assert predicted_peak(made["e-x86-int8"], 1) > 0
    with pytest.raises(UsageError, match="no profile is named 'nobodys'"):
        predicted_peak(made["l-nobodys"], 1)
    assert len({job.key for job in (*made.values(), *bare.values()) if job.problem is None}) == 8


# ----------------------------------------------------------------------------------------------------- ended midway


def start(desk: Desk, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).with_name("fake_sweep.py")), "sweep", str(desk.grid)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        return subprocess.Popen(
            [*command, "-o", str(desk.output), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def alive(desk: Desk) -> list[int]:
    pids = [int(line.split()[3]) for line in (desk.place / "events").read_text().splitlines()]
    found = []
    for pid in pids:
        status = Path(f"/proc/{pid}/status")
        if status.exists() and "State:\tZ" not in status.read_text():
            found.append(pid)
    return found


def test_a_killed_sweep_takes_its_jobs_along_and_is_continued(desk: Desk) -> None:
    desk.model("a", x86_int8={"seconds": 30})
    desk.model("b")
    desk.write("a", "b")
    process = start(desk)
    wait_for(lambda: "a-x86-int8" in desk.starts())
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    wait_for(lambda: not alive(desk))
    left = journal.read(desk.output / "sweep.json")
    assert left is not None and not left.complete
    assert statuses(left) == {
        "a-arm-int4": "built", "a-x86-int8": "running", "b-arm-int4": "waiting", "b-x86-int8": "waiting",
    }  # fmt: skip
    # Its export was done, but nobody saw it: found, and not made again.
    finished = desk.output / "b-arm-int4"
    desk.model("c")
    (desk.place / "a" / "told.json").write_text((desk.place / "c" / "told.json").read_text())
    os.utime(desk.place / "a" / "told.json", ns=(1, 1))
    keys = {job.name: job.key for job in make_jobs(load_grid(desk.grid), validate=True)}
    assert keys["a-arm-int4"] != left.job("a-arm-int4").key  # the control: a changed source is seen
    jobs_left = [job.model_copy(update={"key": keys[job.name]}) for job in left.jobs]
    (desk.output / "sweep.json").write_text(journal.dumps(left.model_copy(update={"jobs": tuple(jobs_left)})))
    subprocess.run(["cp", "-r", str(desk.output / "a-arm-int4"), str(finished)], check=True)
    found = compress.sweep(desk.grid, desk.output)
    assert desk.starts() == ["a-arm-int4", "a-x86-int8", "a-x86-int8", "b-x86-int8"]
    assert found.complete and set(statuses(found).values()) == {"built"}
    assert found.job("b-arm-int4").seconds is None  # nobody saw how long it took


def test_an_interrupted_sweep_ends_its_jobs_and_says_130(desk: Desk) -> None:
    desk.model("a", arm_int4={"seconds": 30}, x86_int8={"seconds": 30})
    desk.write("a")
    process = start(desk, "--jobs", "2")
    wait_for(lambda: len(desk.starts()) == 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.rstrip().endswith("error: interrupted")
    assert alive(desk) == []
    left = journal.read(desk.output / "sweep.json")
    assert left is not None and statuses(left) == {"a-arm-int4": "waiting", "a-x86-int8": "waiting"}
    assert "UNFINISHED" in (desk.output / "sweep.html").read_text()


def test_two_sweeps_of_one_output_exclude_each_other(desk: Desk) -> None:
    desk.model("a")
    grid = desk.write("a")
    desk.output.mkdir()
    with (desk.output / ".sweep.lock").open("w") as other:
        other.write('{"pid": 1234, "host": "elsewhere", "started": "today"}')
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(LockedError) as caught:
            compress.sweep(grid, desk.output)
    assert "another run is sweeping it: process 1234 on elsewhere, started today" in str(caught.value)
    assert "wait for it" in str(caught.value) and desk.starts() == []
    assert compress.sweep(grid, desk.output).exit_code == 0  # the control: the lock was the reason


# ----------------------------------------------------------------------------------------------------------- for real


def contents(output: Path) -> dict[str, dict[str, bytes]]:
    """Return what every artifact's files hold that are no measurements."""
    return {
        folder.name: {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in MEASURED
        }
        for folder in sorted(output.iterdir())
        if (folder / "manifest.json").is_file()
    }


def test_jobs_at_once_leave_the_bytes_of_jobs_in_turn(
    quick: Callable[..., None], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    names = ("llama", "bert:embedding")
    quick(*names)
    models = [{"model": str(tiny_model(name)), "name": name.partition(":")[0]} for name in names]
    grid = {"models": models, "profiles": [{"profile": PLAIN_INT8, "name": "plain"}], "validate": False}
    in_turn = compress.sweep(grid, tmp_path / "in-turn")
    at_once = compress.sweep(grid, tmp_path / "at-once", jobs=2)
    assert statuses(in_turn) == dict.fromkeys(("llama-plain", "bert-plain"), "built")
    assert contents(tmp_path / "in-turn") == contents(tmp_path / "at-once")
    digests = [job.outcome.digest for job in in_turn.jobs if job.outcome]
    assert digests == [job.outcome.digest for job in at_once.jobs if job.outcome] and len(set(digests)) == 2


def test_the_launcher_is_the_command_line(tmp_path: Path) -> None:
    program = [sys.executable, "-P", "-m", "compress.fleet.launch"]
    environment = {**os.environ, "PYTHONPATH": str(Path(compress.__file__).parent.parent)}
    done = subprocess.run([*program, str(os.getpid()), "--version"], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith(f"compress, version {compress.__version__}\n")
    orphan = subprocess.run([*program, "1", "--version"], capture_output=True, text=True, env=environment)
    assert (orphan.returncode, orphan.stdout) == (1, "")  # whoever started it has gone already
