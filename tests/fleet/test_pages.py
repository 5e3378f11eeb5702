"""One comparison three times: what ``README.md``, ``sweep.html`` and the terminal show, and what they escape."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fleet_desk import report
from rich.console import Console

from compress.fleet import best, outcome, pages, picture, terminal, views
from compress.fleet.model import JobRecord, Loss, Outcome, Sweep, Timing
from compress.report.model import EncoderDrift, Report

HOSTILE = '<script>alert(1)</script> | `x` [bold]\u202e"'


def made(kl: float, size: int, rate: float = 100.0, **changes: Any) -> Outcome:
    """Return an outcome as a report with these measures gives it."""
    told = Report.model_validate(report(kl, size, rate))
    loss, timing = outcome._loss(told.drift), outcome._timing(told)  # type: ignore[arg-type]
    shared = {"manifest_sha256": "0" * 64, "digest": f"{size % 16:x}" * 64, "peak_rss_bytes": 400_000_000}
    fields = {"status": "accepted", "exit_code": 0, "model_bytes": size, "loss": loss, "timing": timing, **shared}
    return Outcome.model_validate({**fields, **changes})


def job(model: str, profile: str, found: Outcome | None = None, **changes: Any) -> JobRecord:
    state = "failed" if found is None else "done"
    fields = {"name": f"{model}-{profile}"[:40], "model": model, "profile": profile, "key": "k", "state": state}
    return JobRecord.model_validate({**fields, "outcome": found, "seconds": 130.5, **changes})


def sweep(*jobs: JobRecord, **changes: Any) -> Sweep:
    fields = {"grid": "grid.toml", "complete": True, "created": "2026-11-27T09:00:00+00:00", "versions": {"numpy": "2"}}
    return Sweep(**{**fields, "jobs": jobs, "best": best.of(jobs), **changes})


def fleet() -> Sweep:
    rejected = made(0.9, 40_000_000, status="rejected", exit_code=3, reasons=("kl is 0.9",))
    return sweep(
        job("phi", "arm-int4", made(0.3, 50_000_000, 90)),
        job("phi", "x86-int8", made(0.01, 99_000_000, 60)),
        job("phi", "web-int4", rejected),
        job("bert", "arm-int4", error="the profile does not take it\n  try: another"),
        at_once=2,
    )


def test_the_terminal_has_a_row_a_job() -> None:
    stream = io.StringIO()
    terminal.show(fleet(), Console(file=stream, width=200))
    text = stream.getvalue()
    row = next(line for line in text.splitlines() if line.startswith("arm-int4  accepted"))
    assert row.split() == [
        "arm-int4", "accepted", "50.00", "MB", "0.300", "±", "0.030", "KL", "90.0", "tokens/s", "2.50×", "—",
        "2", "min", "10", "s", "400", "MB", "0" * 12,
    ]  # fmt: skip
    assert "smallest: arm-int4 (50.00 MB, 0.300 ± 0.030 KL, 90.0 tokens/s)" in text
    assert "most accurate below 128 MB: x86-int8" in text and "web-int4: kl is 0.9" in text
    assert text.rstrip().endswith("2 models, 4 jobs: 2 accepted, 1 rejected, 1 failed")
    assert "Up to 2 jobs shared a machine" in text


def test_the_best_are_accepted_and_comparable() -> None:
    jobs = fleet().jobs
    assert {item.what for item in best.of(jobs)} == {"smallest", "fastest", "most accurate"}
    assert all("web" not in item.job for item in best.of(jobs))  # the smallest of all was rejected
    other = made(0.01, 99_000_000, 60)
    assert other.loss and other.timing
    elsewhere = other.model_copy(
        update={
            "loss": other.loss.model_copy(update={"text": "1" * 64}),
            "timing": other.timing.model_copy(update={"machine": "another"}),
        }
    )
    mixed = sweep(jobs[0], job("phi", "x86-int8", elsewhere))
    assert [item.what for item in mixed.best] == ["smallest"]
    (view,) = views.models(mixed)
    assert len(view.notes) == 2 and "none is called the fastest" in view.notes[1]
    assert picture.dots(mixed.jobs) == ("", [])
    assert best.of([job("a", "b")]) == ()


def test_a_latency_is_better_when_it_is_lower() -> None:
    shared = {"unit": "ms", "work": "1 x 128 tokens", "provider": "cpu", "machine": "m", "threads": 1}
    quick, slow = (Timing.model_validate({**shared, "value": value}) for value in (2.0, 9.0))
    jobs = [job("m", name, made(0.1, 9, timing=timing)) for name, timing in (("slow", slow), ("quick", quick))]
    assert next(item.job for item in best.of(jobs) if item.what == "fastest") == "m-quick"


def test_the_picture_joins_what_nothing_smaller_beats() -> None:
    jobs = [job("m", f"p{at}", made(kl, size)) for at, (kl, size) in enumerate([(0.5, 10), (0.7, 20), (0.1, 30)])]
    measure, dots = picture.dots(jobs)
    assert measure == "KL divergence, nats a token" and [dot.name for dot in picture.best_of(dots)] == ["p0", "p2"]
    drawing = ElementTree.fromstring(picture.svg(measure, dots))
    space = "{http://www.w3.org/2000/svg}"
    circles = drawing.findall(f"{space}circle")
    assert len(circles) == 3 and len(drawing.find(f"{space}polyline").get("points", "").split()) == 2  # type: ignore[union-attr]
    # Larger is further right, a larger loss higher up.
    assert float(circles[0].get("cx", "")) < float(circles[2].get("cx", ""))
    assert float(circles[0].get("cy", "")) < float(circles[2].get("cy", ""))
    nothing = Loss(measure="kl", value=0.0, text="0" * 64, items=1)
    ElementTree.fromstring(picture.svg(*picture.dots([job("m", "p", made(0.1, 9, loss=nothing))])))


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        assert not [name for name, _ in attributes if name.startswith("on")]


def test_the_page_needs_nothing_and_runs_nothing() -> None:
    page = _Page()
    text = pages.page(fleet())
    page.feed(text)
    assert "script" not in page.tags and all(link.startswith(("data:", "#")) for link in page.links)
    assert "default-src 'none'" in text and text == pages.page(fleet())
    assert page.tags.count("img") == 1 and page.tags.count("table") == 2 and "FAILED" in text
    assert pages.page(sweep(fleet().jobs[0])).count("PASS") == 1
    assert "REJECTED" in pages.page(sweep(*fleet().jobs[:3]))
    assert "UNFINISHED" in pages.page(sweep(job("a", "b", state="waiting"), complete=False))


def test_hostile_names_and_errors_stay_text() -> None:
    found = sweep(
        job("m", "p", error=HOSTILE, name="a"),
        job("m", "q", made(0.1, 10, status="rejected", exit_code=3, reasons=(HOSTILE,)), name="b"),
        grid=HOSTILE,
        versions={HOSTILE: HOSTILE},
    )
    page = _Page()
    page.feed(pages.page(found))
    assert "script" not in page.tags and "\u202e" not in pages.page(found)
    card = pages.card(found)
    assert "<script>" not in card and "\u202e" not in card and not re.search(r"(?<!\\)\| `x`", card)
    stream = io.StringIO()
    terminal.show(found, Console(file=stream, width=300))
    assert "[bold]" in stream.getvalue() and "\u202e" not in stream.getvalue()


def test_the_card_is_a_table() -> None:
    card = pages.card(fleet())
    lines = card.splitlines()
    assert lines[0] == "# grid.toml" and "| `arm-int4` | accepted | 50.00 MB |" in card
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert pages.card(sweep(job("a", "b", made(0.1, 9)), validated=False)).count("Nothing was measured") == 1


@pytest.mark.parametrize(
    ("codes", "expected"), [([0, 0], 0), ([0, 3], 3), ([3, 4], 4), ([3, 4, None], 1), ([0, None], 1)]
)
def test_the_exit_code_is_the_worst(codes: list[int | None], expected: int) -> None:
    status = {0: "accepted", 3: "rejected", 4: "rejected"}
    jobs = [
        job("m", f"p{at}", None if code is None else made(0.1, 9, exit_code=code, status=status[code]))
        for at, code in enumerate(codes)
    ]
    assert sweep(*jobs).exit_code == expected


def test_an_encoders_loss_is_what_its_task_has() -> None:
    shared = {
        "provider": "cpu", "task": "embedding", "texts": 9, "tokens": 99, "items": 9, "unit": "texts", "max_length": 32,
        "batch": 1, "eval_text": {"name": "t", "sha256": "0" * 64}, "reference": "PyTorch",
    }  # fmt: skip
    has: list[dict[str, Any]] = [
        {"kl_divergence": {"mean": 0.25, "standard_error": None, "p99": 1.0}, "label_agreement": 0.5},
        {"cosine": {"mean": 0.98, "min": 0.9, "standard_error": 0.001}},
        {"label_agreement": 0.875},
        {},
    ]
    found = [outcome._loss(EncoderDrift.model_validate({**shared, **own})) for own in has]
    assert [(item.measure, round(item.value, 6)) for item in found if item] == [
        ("kl", 0.25), ("cosine_distance", 0.02), ("label_disagreement", 0.125),
    ]  # fmt: skip
    assert found[3] is None


def test_a_digest_is_sha256sums_lines(tmp_path: Path) -> None:
    import hashlib

    from compress.package.manifest_schema import File, Manifest, Source

    files = [
        File(name=name, size=1, sha256=letter * 64) for name, letter in (("b", "1"), ("a", "2"), ("README.md", "3"))
    ]
    source = Source(kind="k", id="i", revision=None, files=[])
    found = Manifest(schema_version=1, status="built", source=source, profile={}, seed=0, tools={}, files=files)
    expected = hashlib.sha256(f"{'2' * 64}  a\n{'1' * 64}  b\n".encode()).hexdigest()
    assert outcome.digest(found) == expected
    other = found.model_copy(update={"files": [*files[:2], files[2].model_copy(update={"sha256": "4" * 64})]})
    assert outcome.digest(other) == expected  # a measurement
    assert outcome.digest(found.model_copy(update={"files": files[1:]})) != expected
