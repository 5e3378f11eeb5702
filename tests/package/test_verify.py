"""Planted tamperings: each is told by its kind, and an untouched artifact has nothing to tell."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from compress import cli
from compress.errors import CompressError, printable
from compress.package.manifest import NAME, list_files, measured
from compress.package.onnx_check import check_graph
from compress.package.tree import name_fault, scan
from compress.package.verify import KINDS, verify
from compress.validation.losses import Losses

REPORT = {
    "schema_version": 2,
    "verdict": {"status": "fail", "reasons": ["kl is 0.5, the budget asks for at most 0.4"]},
    "size": {"artifact_bytes": 1000},
    "environment": {
        "versions": {}, "cpu": "c", "cores": 1, "instruction_sets": [], "os": "o", "architecture": "a",
    },
}  # fmt: skip
DRIFT = {
    "provider": "cpu",
    "tokens": 2044,
    "windows": 4,
    "eval_text": {"name": "evaluation", "sha256": "0" * 64},
    "reference": "PyTorch float32 of BF16 weights",
    "reference_perplexity": 13.3,
    "perplexity_ratio": {"value": 1.3, "standard_error": 0.01},
    "kl_divergence": {"mean": 0.4, "standard_error": 0.03, "p99": 2.5},
    "top1_agreement": 0.664,
    "confident_tokens": 900,
    "confident_flips": 31,
    "logit_max_abs": 9.5,
}


@pytest.fixture
def artifact(tiny_artifact: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a copy of an artifact as ``--no-validate`` leaves it."""
    return Path(shutil.copytree(tiny_artifact("llama"), tmp_path / "artifact"))


@pytest.fixture
def rejected(artifact: Path) -> Path:
    """Return an artifact with a report that rejects it."""
    (artifact / "report.json").write_text(json.dumps(REPORT))
    edit(artifact, status="rejected")
    return artifact


def edit(artifact: Path, **changes: Any) -> None:
    """Write the manifest anew with right digests: the attacker can do that too."""
    record = json.loads((artifact / NAME).read_text())
    files = list_files(artifact)
    record |= {"files": files, "measured_files": [item["name"] for item in files if measured(item["name"])]}
    (artifact / NAME).write_text(json.dumps(record | changes))


def edit_bill(artifact: Path) -> None:
    """Write the bill's digests anew as well, then the manifest."""
    path = artifact / "sbom.cdx.json"
    bill = json.loads(path.read_text())
    digests = {item["name"]: item["sha256"] for item in list_files(artifact)}
    for item in bill["components"]:
        item["hashes"][0]["content"] = digests[item["name"]]
    path.write_text(json.dumps(bill))
    edit(artifact)


def kinds(artifact: Path) -> set[str]:
    return {problem.kind for problem in verify(artifact).problems}


def with_data(artifact: Path, key: str, value: str) -> None:
    """Let the graph's first tensor outside lie elsewhere; everything else is made to agree."""
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    tensor = next(item for item in model.graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL)
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    (artifact / "model.onnx").write_bytes(model.SerializeToString())
    edit_bill(artifact)


@pytest.mark.parametrize("name", ["llama", "bert:embedding"])
def test_an_untouched_artifact_passes(name: str, tiny_artifact: Callable[..., Path]) -> None:
    found = verify(tiny_artifact(name, *(("float",) if ":" in name else ())))
    assert found.problems == []
    assert (found.manifest_status, found.signature) == ("built", "absent")


def test_a_rejected_one_is_whole_too(rejected: Path) -> None:
    assert kinds(rejected) == set()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def first_listed(artifact: Path) -> dict[str, Any]:
    record = json.loads((artifact / NAME).read_text())
    return dict(record["files"][0])


def listed_as(artifact: Path, name: str) -> None:
    record = json.loads((artifact / NAME).read_text())
    edit(artifact, files=[*record["files"], {**first_listed(artifact), "name": name}])


def replace_by_link(artifact: Path) -> None:
    moved = artifact.parent / "same.json"
    (artifact / "config.json").rename(moved)
    (artifact / "config.json").symlink_to(moved)


def link_inside(artifact: Path) -> None:
    (artifact / "copy.json").symlink_to("config.json")


def linked_folder(artifact: Path) -> None:
    (artifact / "onnx").symlink_to(artifact.parent)


def relabelled_report(artifact: Path) -> None:
    report = {**REPORT, "verdict": {"status": "pass", "reasons": []}}
    (artifact / "report.json").write_text(json.dumps(report))
    edit(artifact, status="rejected")


def newer_report(artifact: Path) -> None:
    (artifact / "report.json").write_text(json.dumps({**REPORT, "schema_version": 3}))
    edit(artifact, status="rejected")


def damaged_report(artifact: Path) -> None:
    (artifact / "report.json").write_text(json.dumps({**REPORT, "unknown": 1}))
    edit(artifact, status="rejected")


def truncated(artifact: Path) -> None:
    data = artifact / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-64])
    edit_bill(artifact)


def two_statuses(artifact: Path) -> None:
    text = (artifact / NAME).read_text().rstrip()
    (artifact / NAME).write_text(text[:-1] + ', "status": "accepted"}')


def config_outside(artifact: Path) -> None:
    genai = json.loads((artifact / "genai_config.json").read_text())
    genai["model"]["decoder"]["filename"] = "../model.onnx"
    (artifact / "genai_config.json").write_text(json.dumps(genai))
    edit_bill(artifact)


def bad_graph(artifact: Path) -> None:
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    model.graph.node[0].input[0] = "nowhere"
    (artifact / "model.onnx").write_bytes(model.SerializeToString())
    edit_bill(artifact)


def no_graph(artifact: Path) -> None:
    (artifact / "model.onnx").write_bytes(b"\xff" * 100)
    edit_bill(artifact)


def hidden_in_a_subgraph(artifact: Path) -> None:
    """Put a tensor with a place outside into a branch of an ``If`` node, where loops over initializers do not look."""
    inner = onnx.TensorProto(name="inner", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    inner.external_data.add(key="location", value="../secret")
    constant = onnx.helper.make_node("Constant", [], ["c"])
    constant.attribute.append(onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, t=inner))
    branch = onnx.helper.make_graph([constant], "b", [], [onnx.helper.make_tensor_value_info("c", 1, [1])])
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("If", ["cond"], ["d"], then_branch=branch, else_branch=branch))
    (artifact / "model.onnx").write_bytes(model.SerializeToString())
    edit_bill(artifact)


def compiled_elsewhere(artifact: Path) -> None:
    node = onnx.helper.make_node(
        "EPContext", [], ["y"], domain="com.microsoft", embed_mode=0, ep_cache_context="/etc/passwd"
    )
    output = onnx.helper.make_tensor_value_info("y", 1, [1])
    graph = onnx.helper.make_graph([node], "g", [], [output])
    (artifact / "ctx.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    edit(artifact)


TAMPERINGS: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "a flipped bit of a weight": (lambda a: flip(a / "model.onnx.data"), {"digest"}),
    "a changed config": (lambda a: (a / "config.json").write_text("{}"), {"size"}),
    "a missing file": (lambda a: (a / "tokenizer.json").unlink(), {"missing"}),
    "an extra file": (lambda a: (a / "run.py").write_text("print()"), {"extra"}),
    "an extra file in a folder": (lambda a: ((a / ".git").mkdir(), (a / ".git" / "x").touch()), {"extra"}),
    "a link out in place of the same bytes": (replace_by_link, {"symlink"}),
    "a link inside": (link_inside, {"symlink"}),
    "a linked folder": (linked_folder, {"symlink"}),
    "a named pipe": (lambda a: os.mkfifo(a / "pipe"), {"special"}),
    "a pipe in place of the manifest": (lambda a: ((a / NAME).unlink(), os.mkfifo(a / NAME)), {"special"}),
    "no manifest": (lambda a: (a / NAME).unlink(), {"manifest"}),
    "a newer manifest": (lambda a: edit(a, schema_version=2), {"newer-schema"}),
    "a manifest with an unknown key": (lambda a: edit(a, trusted=True), {"manifest"}),
    "a manifest of 100 MB": (lambda a: (a / NAME).write_bytes(b'{"a": "' + b"x" * 100_000_000), {"manifest"}),
    "a deeply nested manifest": (lambda a: (a / NAME).write_text("[" * 100_000), {"manifest"}),
    "a nested object in the manifest": (
        lambda a: edit(a, pruning=json.loads('{"a":' * 40 + "1" + "}" * 40)), {"manifest"}),
    "two statuses": (two_statuses, {"manifest"}),
    "measured files that are not": (lambda a: edit(a, measured_files=["model.onnx"]), {"manifest"}),
    "a name with ..": (lambda a: listed_as(a, "../config.json"), {"name"}),
    "an absolute name": (lambda a: listed_as(a, "/etc/passwd"), {"name"}),
    "a name with a backslash": (lambda a: listed_as(a, "onnx\\model.onnx"), {"name"}),
    "a name twice": (lambda a: listed_as(a, first_listed(a)["name"]), {"name"}),
    "the manifest in the manifest": (lambda a: listed_as(a, NAME), {"name"}),
    "accepted without a report": (lambda a: edit(a, status="accepted"), {"status"}),
    "a bill of other bytes": (lambda a: (flip(a / "model.onnx.data"), edit(a)), {"sbom"}),
    "a damaged bill": (lambda a: ((a / "sbom.cdx.json").write_text('{"bomFormat": 1}'), edit(a)), {"sbom"}),
    "data above the directory": (lambda a: with_data(a, "location", "../model.onnx.data"), {"external-data"}),
    "data at an absolute path": (lambda a: with_data(a, "location", "/etc/passwd"), {"external-data"}),
    "data that is a graph": (lambda a: with_data(a, "location", "model.onnx"), {"external-data"}),
    "data that is not there": (lambda a: with_data(a, "location", "other.data"), {"external-data"}),
    "data beyond the end": (lambda a: with_data(a, "offset", "999999999"), {"external-data"}),
    "data at a negative offset": (lambda a: with_data(a, "offset", "-4"), {"external-data"}),
    "less data than the shape": (lambda a: with_data(a, "length", "1"), {"external-data"}),
    "data in a subgraph": (hidden_in_a_subgraph, {"external-data"}),
    "truncated data, digests made anew": (truncated, {"external-data"}),
    "a compiled binary elsewhere": (compiled_elsewhere, {"external-data", "sbom"}),
    "a graph whose input comes from nowhere": (bad_graph, {"onnx"}),
    "no graph at all": (no_graph, {"onnx"}),
    "a runtime's config that leads outside": (config_outside, {"config"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampering_is_told_by_its_kind(name: str, artifact: Path) -> None:
    tamper, expected = TAMPERINGS[name]
    assert kinds(artifact) == set()
    tamper(artifact)
    assert kinds(artifact) == expected


def with_losses(artifact: Path, *, change: str = "") -> None:
    """Give the report a drift and the file of its losses; ``change`` what it says of the file's digest."""
    record = Losses(np.ones((4, 511), np.float32), np.ones((4, 511), np.float32), "0" * 64).write(artifact)
    assert record is not None
    positions = record.model_dump() | ({"sha256": change} if change else {})
    drift = {**DRIFT, "positions": positions}
    (artifact / "report.json").write_text(json.dumps({**REPORT, "drift": drift}))
    edit(artifact, status="rejected")


@pytest.mark.parametrize(
    ("tamper", "expected"),
    [
        (with_losses, set()),
        (lambda a: with_losses(a, change="1" * 64), {"report"}),
        (lambda a: (with_losses(a), (a / "drift.npz").unlink(), edit(a)), {"report"}),
        (relabelled_report, {"status"}),
        (lambda a: edit(a, status="accepted"), {"status"}),
        (lambda a: edit(a, status="built"), {"status"}),
        (newer_report, {"newer-schema"}),
        (damaged_report, {"report"}),
        (lambda a: (a / "report.json").write_text(json.dumps(REPORT | {"schema_version": 1})) and edit(a), set()),
    ],
    ids=[
        "losses",
        "other losses",
        "losses gone",
        "pass made of fail",
        "accepted",
        "built",
        "newer report",
        "unknown key",
        "older report",
    ],
)
def test_the_report_and_the_status_agree(tamper: Callable[[Path], object], expected: set[str], rejected: Path) -> None:
    tamper(rejected)
    assert kinds(rejected) == expected


def test_all_problems_are_told(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(artifact / "model.onnx.data")
    (artifact / "tokenizer.json").unlink()
    (artifact / "a\x1b[2Jb").touch()
    assert cli.run(["verify", str(artifact), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == "failed"
    assert sorted((item["kind"], item["file"]) for item in document["problems"]) == [
        ("digest", "model.onnx.data"), ("extra", "a\x1b[2Jb"), ("missing", "tokenizer.json"),
    ]  # fmt: skip
    assert cli.run(["verify", str(artifact)]) == 1
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 4 and "\x1b" not in out and "failed: 3 problems" in out


def test_it_exits_0_where_all_is_well(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", str(artifact), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["status"], document["problems"]) == ("ok", [])
    assert cli.run(["verify", str(artifact / "nowhere")]) == 1


def test_an_older_manifest_and_no_bill_pass(artifact: Path) -> None:
    (artifact / "sbom.cdx.json").unlink()
    edit(artifact)
    record = json.loads((artifact / NAME).read_text())
    del record["measured_files"]
    (artifact / NAME).write_text(json.dumps(record))
    assert kinds(artifact) == set()


def test_data_in_a_folder_below_is_inside(artifact: Path) -> None:
    (artifact / "onnx").mkdir()
    (artifact / "model.onnx.data").rename(artifact / "onnx" / "weights.data")
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "onnx/weights.data"
    (artifact / "model.onnx").write_bytes(model.SerializeToString())
    assert check_graph(artifact, "model.onnx", scan(artifact)) == []
    shutil.move(artifact / "onnx", artifact / "real")
    (artifact / "onnx").symlink_to("real")
    ((kind, message), *_) = check_graph(artifact, "model.onnx", scan(artifact))
    assert kind == "external-data" and "symbolic link" in message


@pytest.mark.parametrize("name", ["a", "onnx/model.onnx", "a b", "é.json", "...", "a..b"])
def test_good_names(name: str) -> None:
    assert name_fault(name) is None


@pytest.mark.parametrize(
    "name", ["", ".", "..", "./a", "a//b", "a/", "a/../b", "/a", "a\\b", "C:x", "a\nb", "a\0", "x" * 2000]
)
def test_bad_names(name: str) -> None:
    assert name_fault(name) is not None


def test_too_many_entries_are_no_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        (tmp_path / str(number)).touch()
    monkeypatch.setattr("compress.package.tree.MAX_ENTRIES", 3)
    with pytest.raises(CompressError, match="no artifact"):
        scan(tmp_path)


def test_what_is_printed_commands_no_terminal() -> None:
    assert printable("a\x1b]0;x\x07\udc80") == "a\\x1b]0;x\\x07\\udc80"
    assert len(printable("x" * 1000, 400)) == 400


def test_every_kind_was_planted() -> None:
    told = set().union(*(expected for _, expected in TAMPERINGS.values())) | {"report"}
    assert told | {"unsigned", "signature"} == set(KINDS)  # these two: test_sign.py
