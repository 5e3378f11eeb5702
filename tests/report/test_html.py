"""The report's page: whole, escaped, without requests, the same bytes each time; and what its figures say."""

from __future__ import annotations

import base64
import copy
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import full_reports
import pytest
from pages import Page

from compress.report import figures, html, limits, reproduce, sheet, wording
from compress.report import json as report_json
from compress.report.model import Histogram, Report, TensorRecord

ALL = {name: getattr(full_reports, name) for name in ("DECODER", "ENCODER_FULL", "TAGGER", "MINIMAL")}
HOSTILE = (
    "</style><script>alert(1)</script>]]>--><img src=x onerror=y>\"'&amp; \u202egnp.exe\u202c \u2066\u200f\x00\x1b[31m"
)


def page(document: dict[str, Any], **record: Any) -> str:
    return html.page(Report.model_validate(document), record or None)


@pytest.mark.parametrize("name", ALL)
def test_every_element_is_closed_and_the_outline_is_sound(name: str) -> None:
    source = page(ALL[name])
    found = Page(source)
    assert found.errors == [] and source.startswith("<!doctype html>")
    assert found.named("html")[0]["lang"] == "en" and len(found.named("title")) == 1
    assert found.headings[0] == 1 and found.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(found.headings, found.headings[1:], strict=False))
    assert all(image["alt"] for image in found.named("img"))
    assert all(head.get("scope") in {"row", "col"} for head in found.named("th"))
    names = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(names) == len(set(names))


def test_a_tag_that_is_not_closed_is_seen() -> None:
    assert Page("<p><b>text</p>").errors and Page("<div>").errors


@pytest.mark.parametrize("name", ALL)
def test_nothing_runs_and_nothing_is_fetched(name: str) -> None:
    source = page(ALL[name])
    found = Page(source)
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in found.tags}
    assert "default-src 'none'" in str(found.named("meta")[1]["content"])
    addresses = [v for _, attributes in found.tags for k, v in attributes.items() if k in {"src", "srcset", "data"}]
    assert all(str(address).startswith("data:image/svg+xml;base64,") for address in addresses)
    assert not [k for _, attributes in found.tags for k in attributes if k.startswith("on")]
    assert "http:" not in source and "https:" not in source and "url(" not in source and "@import" not in source


@pytest.mark.parametrize("name", ALL)
def test_the_same_report_gives_the_same_bytes(name: str) -> None:
    assert page(ALL[name], seed=3) == page(copy.deepcopy(ALL[name]), seed=3)
    assert page(ALL[name], seed=3) == page(json.loads(json.dumps(ALL[name])), seed=3)


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item, path)
    else:
        yield path, value


@pytest.mark.parametrize("name", ["DECODER", "ENCODER_FULL", "TAGGER"])
def test_every_text_of_the_report_is_on_the_page(name: str) -> None:
    document, found = ALL[name], Page(page(ALL[name]))
    said = "".join((found.text + " ".join(str(v) for _, a in found.tags for v in a.values())).split())
    # Words of a fixed set are written out, and what both sides write is cut where they part.
    worded = {"status", "state", "evidence", "measure", "metric", "unit", "source", "artifact", "kind", "step"}
    missing = [
        (path, value)
        for path, value in leaves(document)
        if isinstance(value, str) and path[-1] not in worded and "".join(value.split()) not in said
    ]
    assert missing == []
    for sample in document.get("samples", ()):
        assert "".join(sample["source"].split()) in said and "".join(sample["artifact"].split()) in said


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (
            "DECODER",
            (
                "FAIL", "owner/model", "arm-int4", "86.50 MB", "6.24 times smaller", "540 MB", "0.412 ± 0.010",
                "0.392 to 0.433", "1.3490 ± 0.0070", "66.4%", "31 of 900", "107", "34.0", "551", "671", "0.82×",
                "not measured: the float32 model needs", "339 of 341 on qnn", "/layers/0/Gelu (Gelu) on CPU",
                "time is not measured where the run is simulated", "simulator stood in for the device",
                "alike for 9 tokens of at most 32", "8.3 bits, error 0.61%", "int8 b32 sym", "4.97×", "12.5 s",
                "skip_layer_norm", "25.4% of the evaluation text is in the calibration text", "abc123", "mean 0.412",
                "p99 2.50", "297 in the highest column", "2026-05-04 03:02 UTC", "intermediate size", "1,536",
            ),
        ),
        (
            "ENCODER_FULL",
            (
                "PASS", "0.99852 ± 0.00012", "0.9877", "96.5 ± 1.1%", "94.2 to 98.7%", "91.06% → 90.83%", "-0.23",
                "872 labelled examples of labels.jsonl, 3 of them cut to 512 tokens", "5 lost, 3 won", "4.12", "31,030",
                "1.50×", "3.25×", "not measured: it was not asked for", "error not measured", "text that the model",
                "worst 0.0123",
            ),
        ),
        ("TAGGER", ("99.12 ± 0.31%", "10,701 tokens", "0.01230 ± 0.00040", "0.210", "0.750", "Answers that changed")),
        ("MINIMAL", ("PASS", "1.23 KB", "unknown model", "Not measured.", "The profile sets no limit that applies")),
    ],
)  # fmt: skip
def test_the_numbers_are_on_the_page(name: str, facts: tuple[str, ...]) -> None:
    found = Page(page(ALL[name]))
    said = "".join((found.text + " ".join(str(v) for _, a in found.tags for v in a.values())).split()).lower()
    missing = [fact for fact in facts if "".join(fact.split()).lower() not in said]
    assert missing == []


def hostile(value: Any) -> Any:
    """Put what is hostile into every text that a report may choose freely."""
    fixed = {"status", "state", "evidence", "measure", "metric", "unit", "step", "schema_version"}
    if isinstance(value, dict):
        return {key: item if key in fixed else hostile(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hostile(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


@pytest.mark.parametrize("name", ["DECODER", "ENCODER_FULL", "TAGGER"])
def test_hostile_text_stays_text(name: str) -> None:
    document = hostile(ALL[name])
    document["calibration"] = ALL[name].get("calibration")
    if document["calibration"]:
        document["calibration"] = {**document["calibration"], "name": HOSTILE, "sha256": HOSTILE}
    document["fusions"] = {HOSTILE: 2}
    document["profile"]["resolved"] = {HOSTILE: {HOSTILE: HOSTILE}}
    document["environment"]["versions"] = {HOSTILE: HOSTILE}
    for item in document["providers"]:
        item["not_measured"], item["versions"] = {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE}
    source, plain = page(document), page(ALL[name])
    found = Page(source)
    assert found.errors == [] and "<script" not in source and "onerror=y>" not in source.replace("onerror=y&gt;", "")
    assert {tag for tag, _ in found.tags} <= {tag for tag, _ in Page(plain).tags} | {"ul", "li", "h4"}
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\x00\x1b]", source)
    assert "⌈U+202E⌉gnp.exe" in found.text
    for image in found.named("img"):
        ElementTree.fromstring(base64.b64decode(str(image["src"]).partition(",")[2]))


def test_a_lone_surrogate_is_spelled_out() -> None:
    assert wording.visible("a\ud800b\tc\nd\u200de") == "a⌈U+D800⌉b\tc\nd\u200de"


def test_a_simulators_time_is_never_shown_as_speed() -> None:
    for name in ("DECODER", "ENCODER_FULL"):
        document = copy.deepcopy(ALL[name])
        document["speed"][0]["evidence"] = "simulated"
        said = Page(page(document)).text
        assert "Not shown as speed" in said and "tokens a second" not in said and "Time of a run" not in said
        assert not re.search(r"\b(107|551|4\.12)\b", said)


def test_a_report_of_an_older_version_has_a_page(tmp_path: Path) -> None:
    old = {key: value for key, value in full_reports.REPORT.items() if key not in ("created", "tensors", "samples")}
    (tmp_path / "report.json").write_text(json.dumps({**old, "schema_version": 1, "providers": []}))
    html.write(report_json.read(tmp_path / "report.json"), tmp_path)
    said = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "339 of 339 on cpu" in said and "Samples" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_limits_are_those_of_the_model_and_the_gates_answers() -> None:
    rows = limits.limits(Report.model_validate(full_reports.DECODER))
    assert [(row.label, row.measured, row.asked, row.state) for row in rows] == [
        ("KL divergence, nats a token", "0.412 ± 0.010", "≤ 0.4", "outside"),
        ("Same most probable token", "66.4%", "≥ 50%", "within"),
        ("Speed against PyTorch", None, "≥ 1×", "not measured"),
        ("Speed against float ONNX", "3.15×", "≥ 1.25×", "within"),
        ("Graph and weights", "86.50 MB", "≤ 88.00 MB", "within"),
    ]
    assert rows[0].gauge is not None and rows[0].gauge.value > rows[0].gauge.limit
    unlabelled = copy.deepcopy(full_reports.ENCODER_FULL)
    unlabelled["drift"]["task_accuracy"] = None
    labels = [row.label for row in limits.limits(Report.model_validate(unlabelled))]
    assert "Cosine, mean" in labels and not [label for label in labels if "Accuracy" in label or "KL" in label]


@pytest.mark.parametrize("measure", limits.LABELS)
@pytest.mark.parametrize(("value", "error"), [(0.0, None), (-0.01, 0.1), (0.5, 0.02), (1.0, 0.0), (1e9, 1.0)])
def test_a_gauge_stays_on_its_scale(measure: str, value: float, error: float | None) -> None:
    for direction in ("max", "min"):
        gauge = limits._gauge(measure, direction, 0.9, value, error)
        for place in (gauge.value, gauge.limit, *gauge.allowed, *(gauge.spread or ())):
            assert 0 <= place <= 1 and math.isfinite(place)
        if 0 <= value <= 1 and value != 0.9:
            assert (gauge.value < gauge.limit) == (value < 0.9)


def test_the_command_makes_the_same_profile_again() -> None:
    from compress.cli import cli
    from compress.profile import load_profile, parse_profile

    report = Report.model_validate(full_reports.DECODER)
    found = reproduce.reproduction(report, {"seed": 7})
    assert found is not None
    words = shlex.split(" ".join(line.removesuffix("\\") for line in found.lines))
    assert words[:3] == ["compress", "export", "owner/model"] and words[-2:] == ["--seed", "7"]
    pairs = list(zip(words[3::2], words[4::2], strict=True))
    assert ("--revision", "abc123") in pairs and ("--calibration-text", "domain.txt") in pairs
    overrides = [value for option, value in pairs if option == "--set"]
    assert sorted(item.partition("=")[0] for item in overrides) == sorted(
        item.partition("=")[0] for item in full_reports.CHANGES
    )
    assert report.profile is not None
    assert load_profile("arm-int4", overrides) == parse_profile(report.profile.resolved, where="here")
    command = cli.commands["export"]
    assert not {option for option, _ in pairs} - {name for item in command.params for name in item.opts}


def test_a_budget_that_was_taken_away_is_said() -> None:
    document = copy.deepcopy(full_reports.DECODER)
    del document["profile"]["resolved"]["budget"]["max_kl"]
    found = reproduce.reproduction(Report.model_validate(document))
    assert found is not None and "'budget.max_kl=\"none\"'" in found.words
    assert not any("as this version has it" in note for note in found.notes)


def test_what_no_command_can_say_is_said_in_words() -> None:
    document = copy.deepcopy(full_reports.DECODER)
    del document["profile"]["resolved"]["quantize"]["roles"]["embedding"]["block_size"]  # no --set removes it
    found = reproduce.reproduction(Report.model_validate(document))
    assert found is not None and "--set" not in found.words
    assert any("not arm-int4 as this version has it" in note for note in found.notes)
    assert any("seed is in manifest.json" in note for note in found.notes)
    document["profile"]["name"] = "mine; rm -rf /"
    found = reproduce.reproduction(Report.model_validate(document))
    assert found is not None and "'mine; rm -rf /.toml'" in found.words
    assert reproduce.reproduction(Report.model_validate(full_reports.MINIMAL)) is None


def test_a_distributions_columns_and_marks_are_where_they_belong() -> None:
    found = Histogram(measure="kl", edges=(0.001, 0.01, 0.1, 1.0), counts=(1, 4, 2))
    figure = figures.histogram(found, "tokens", [("mean", 0.0316227766), ("p99", 5.0)])
    assert figure is not None and [column.share for column in figure.columns] == [0.25, 1.0, 0.5]
    assert [column.label for column in figure.columns] == ["below 0.0100", "0.0100 to 0.100", "0.100 and above"]
    assert [round(tick.place, 6) for tick in figure.ticks] == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-6)
    assert [tick.text for tick in figure.ticks] == ["10⁻³", "0.01", "0.1", "1"]
    assert figure.marks[0].place == pytest.approx(0.5) and figure.marks[1].place == 1.0
    assert "most, 4, lie at 0.0100 to 0.100; 71% lie there or below. Mean 0.0316, p99 5.00." in figure.summary
    empty = Histogram(measure="kl", edges=(0.0, 1.0), counts=(0,))
    assert figures.histogram(empty, "tokens", []) is None


def test_shades_follow_the_errors_order() -> None:
    def record(layer: int | None, error: float | None) -> TensorRecord:
        return TensorRecord(
            name=f"{layer}", role="down", layer=layer, storage="int4", bits=4.25, bytes=100, relative_error=error
        )

    errors = [0.001, *(0.07 + 0.001 * index for index in range(20)), None]
    strip = figures.heat_strip([record(layer, error) for layer, error in enumerate(errors)])
    assert strip is not None
    levels = [cell.level for cell in strip.rows[0].cells if cell]
    assert levels[-1] is None and levels[:-1] == sorted(levels[:-1]) and set(levels[:-1]) == set(range(7))
    assert strip.legend[0][1].startswith("0.10% to") and len(strip.legend) == 7
    alike = figures.heat_strip([record(layer, 0.07) for layer in range(9)])
    assert alike is not None and {cell.level for cell in alike.rows[0].cells if cell} == {3}
    outside = figures.heat_strip([record(None, None)])
    assert outside is not None and outside.rows == () and outside.legend == () and len(outside.others) == 1
    assert figures.heat_strip([]) is None


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.41253, 0.01043, "0.413 ± 0.010"),
        (0.5, None, "0.5"),
        (12.0, 0.0, "12.0000 ± 0.0000"),
        (123.4, 25.0, "123 ± 25"),
    ],
)
def test_no_more_digits_than_were_measured(value: float, error: float | None, text: str) -> None:
    assert wording.with_error(value, error) == text


def test_where_the_samples_part_is_marked() -> None:
    source = page(full_reports.DECODER)
    assert "rocks and <mark>shows</mark> them" in source and "rocks and <mark>helps</mark> sailors" in source
    assert "values) / <mark>len</mark> …" in source, "the source was only asked for the next token"
    assert source.count("<mark>") == 4, "two samples differ, on both sides"


@pytest.mark.parametrize(
    ("left", "right", "alike"),
    [
        ("to consider", "to check", "to "),
        ("sum / len", "sum / float", "sum / "),
        ("a, b", "a; b", "a"),
        ("same", "same and more", "same"),
        ("cat", "cats", ""),
        ("", "x", ""),
    ],
)
def test_texts_part_at_a_word(left: str, right: str, alike: str) -> None:
    assert left[: sheet._alike(left, right)] == alike == right[: sheet._alike(right, left)]


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("2026-05-04T03:02:01Z", "2026-05-04 03:02 UTC"),
        ("2026-05-04T03:02:01+00:00", "2026-05-04 03:02 UTC"),
        ("2026-05-04T03:02:01+02:00", "2026-05-04T03:02:01+02:00"),
        ("yesterday", "yesterday"),
    ],
)
def test_a_time_is_shown_to_the_minute_where_it_is_one(told: str, shown: str) -> None:
    assert wording.moment(told) == shown
