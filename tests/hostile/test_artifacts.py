"""Damaged and hostile artifacts through the command line: each is one clear error, and nothing else changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from compress import tokens
from compress.cli import run
from compress.package.manifest import list_files, measured
from hostile import Terminal, snapshot, terminal

__all__ = ["terminal"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def artifact(tiny_artifact: Callable[..., Path], terminal: Terminal) -> Path:
    return Path(shutil.copytree(tiny_artifact("llama"), terminal.root / "artifact"))


def agree(artifact: Path, **changes: Any) -> None:
    """Write the manifest anew with right digests: the attacker can do that too."""
    record = json.loads((artifact / "manifest.json").read_text())
    files = list_files(artifact)
    record |= {"files": files, "measured_files": [item["name"] for item in files if measured(item["name"])]}
    (artifact / "manifest.json").write_text(json.dumps(record | changes))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_graph(artifact: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    change(model)
    (artifact / "model.onnx").write_bytes(model.SerializeToString())


def external(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(item for item in model.graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL)


def place(artifact: Path, **fields: str) -> None:
    """Let the graph's first tensor outside lie elsewhere."""

    def change(model: onnx.ModelProto) -> None:
        for entry in external(model).external_data:
            entry.value = fields.get(entry.key, entry.value)

    edit_graph(artifact, change)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as stream:
        stream.truncate(size)


def swap(artifact: Path) -> None:
    one, two = artifact / "config.json", artifact / "genai_config.json"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def deep_graph(artifact: Path) -> None:
    """Put a graph into a node into a graph ... deeper than protobuf reads."""
    inner = b""
    for _ in range(3000):
        field = b"\x32" + varint(len(inner)) + inner  # AttributeProto.g
        node = b"\x2a" + varint(len(field)) + field  # NodeProto.attribute
        inner = b"\x0a" + varint(len(node)) + node  # GraphProto.node
    (artifact / "model.onnx").write_bytes(b"\x3a" + varint(len(inner)) + inner)


def varint(number: int) -> bytes:
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def library_option(artifact: Path) -> None:
    """A provider loads what such an option names as native code."""
    (artifact / "evil.so").write_bytes(b"\x7fELF")
    record = json.loads((artifact / "manifest.json").read_text())
    record["profile"]["provider_options"] = {"backend_path": str(artifact / "evil.so")}
    agree(artifact, profile=record["profile"])


#: What is done, whether `generate` and `inspect` refuse it too (they do not read every byte), and what verify says.
DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "a truncated graph": (lambda a: truncate(a / "model.onnx", 1000), ("generate", "inspect", "bench"), "size"),
    "a truncated data file": (lambda a: truncate(a / "model.onnx.data", 100), ("generate", "bench"), "size"),
    "a flipped bit of the weights": (lambda a: flip(a / "model.onnx.data"), (), "digest"),
    "two configs swapped": (swap, ("generate", "bench"), "size"),
    "an extra file": (lambda a: (a / "run.sh").write_text("#!/bin/sh"), (), "extra"),
    "a link in place of the data": (
        lambda a: ((a / "model.onnx.data").unlink(), (a / "model.onnx.data").symlink_to("/dev/zero")),
        ("generate", "bench"), "symlink"),
    "a link in place of the graph": (
        lambda a: ((a / "model.onnx").rename(a.parent / "moved"), (a / "model.onnx").symlink_to("../moved")),
        ("generate", "bench"), "symlink"),
    "a pipe in place of the manifest": (
        lambda a: ((a / "manifest.json").unlink(), os.mkfifo(a / "manifest.json")), ("bench",), "special"),
    "a pipe in place of the config": (
        lambda a: ((a / "config.json").unlink(), os.mkfifo(a / "config.json")), ("generate", "bench"), "special"),
    "a name above in the manifest": (
        lambda a: edit_json(a / "manifest.json", lambda m: m["files"][0].update(name="../../secret")), (), "name"),
    "a manifest that is deep": (
        lambda a: (a / "manifest.json").write_text("[" * 100_000), ("inspect", "bench"), "manifest"),
    "a manifest with a key twice": (
        lambda a: (a / "manifest.json").write_text('{"status": "accepted", "status": "rejected"}'),
        ("inspect", "bench"), "manifest"),
    "a manifest of lists": (
        lambda a: edit_json(a / "manifest.json", lambda m: m.update(fusions=[1], source=[], tools=[])),
        ("inspect", "bench"), "manifest"),
    "fusions that are none": (
        lambda a: edit_json(a / "manifest.json", lambda m: m.update(fusions=[1])), ("inspect",), "manifest"),
    "a profile that loads a library": (library_option, ("bench",), "sbom"),
    "a session option that writes a file": (
        lambda a: edit_json(a / "genai_config.json", lambda c: c["model"]["decoder"]["session_options"].update(
            {"ep.context_enable": "1", "ep.context_file_path": "../written.onnx"})),
        ("generate", "bench"), "size"),
    "a graph elsewhere": (
        lambda a: edit_json(a / "genai_config.json", lambda c: c["model"]["decoder"].update(filename="../x.onnx")),
        ("generate", "bench"), "size"),
    "data above": (lambda a: place(a, location="../../secret"), ("generate", "bench"), "size"),
    "data at an absolute path": (lambda a: place(a, location="/etc/passwd"), ("generate", "bench"), "external-data"),
    "data beyond the end": (lambda a: place(a, offset=str(1 << 40)), ("generate", "bench"), "external-data"),
    "a length below zero": (lambda a: place(a, length="-1"), ("generate", "bench"), "external-data"),
    "a shape of exabytes": (
        lambda a: edit_graph(a, lambda m: external(m).dims.__setitem__(0, 1 << 60)),
        ("generate", "bench"), "external-data"),
    "a graph that is deep": (deep_graph, ("generate", "inspect", "bench"), "onnx"),
    "a graph of another kind": (
        lambda a: (a / "model.onnx").write_bytes(b"\x00" * 1000), ("generate", "inspect", "bench"), "onnx"),
    "an operator that does not exist": (
        lambda a: edit_graph(a, lambda m: setattr(m.graph.node[0], "op_type", "Nothing")),
        ("generate", "bench"), "onnx"),
    "a report of nonsense": (
        lambda a: (a / "report.json").write_text('{"schema_version": 1e400}'), ("inspect",), "report"),
    "a tokenizer of nonsense": (lambda a: (a / "tokenizer.json").write_text("{}"), ("generate",), "size"),
    "an end token of 2**70": (
        lambda a: edit_json(a / "generation_config.json", lambda c: c.update(eos_token_id=1 << 70)),
        ("generate",), "size"),
}  # fmt: skip
COMMANDS = {
    "verify": (),
    "generate": ("words", "--new-tokens", "2", "--threads", "1"),
    "inspect": (),
    "bench": ("--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1", "--threads", "1"),
    "validate": ("--threads", "1"),
}
CASES = [(name, command) for name, (_, more, _) in DAMAGES.items() for command in ("verify", *more)]


@pytest.mark.parametrize(("name", "command"), CASES)
def test_a_damaged_artifact_is_refused(name: str, command: str, artifact: Path, terminal: Terminal) -> None:
    damage, _, kind = DAMAGES[name]
    (terminal.root / "secret").write_text("the user's own")
    damage(artifact)
    parts = (kind,) if command == "verify" else ()
    # A graph that its runtime refuses is the provider's to tell: exit code 4.
    terminal.refuses(command, str(artifact), *COMMANDS[command], parts=parts, codes=(1, 2, 4))


@pytest.mark.parametrize(
    "name", ["data above", "a profile that loads a library", "a manifest of lists", "two configs swapped"]
)
def test_validate_refuses_it_before_anything_is_written(
    name: str, artifact: Path, terminal: Terminal, tiny_model: Callable[[str], Path]
) -> None:
    DAMAGES[name][0](artifact)
    terminal.refuses("validate", str(artifact), "--reference", str(tiny_model("llama")), *COMMANDS["validate"])


def test_the_artifact_itself_is_good(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control: what is damaged above runs."""
    for command in ("verify", "generate", "inspect", "bench"):
        assert run([command, str(artifact), *COMMANDS[command]]) == 0, capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- programs


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{% for i in range(10**9) %}{{ i }}{% endfor %}", "Range too big"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "without an end"),
        ("{{ 'x' * 10**10 }}", "memory"),
        ("{{ 'x' * 10**8 }}", "template"),
        ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "writes more than"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ ''.__class__ }}", "the prompt is empty"),
        ("{{ self.__init__.__globals__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "refuses"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "refuses"),
        ("{{ '%1000000000s' % 'x' }}", ""),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% if", "refuses"),
    ],
)
def test_a_hostile_template_is_refused(
    template: str, part: str, terminal: Terminal, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BASE_SECONDS", 1.0)
    (artifact / "chat_template.jinja").write_text(template)
    terminal.refuses("generate", str(artifact), *COMMANDS["generate"], parts=(part,))


def test_a_template_of_words_is_not_refused(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control: a template is why the prompts above were refused, and not that there is one."""
    (artifact / "chat_template.jinja").write_text(TEMPLATE)
    assert run(["generate", str(artifact), *COMMANDS["generate"]]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("pattern", [r"(w+)+$", r"(w|w)*!"])
def test_a_tokenizer_that_never_ends(
    pattern: str, artifact: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BASE_SECONDS", 1.0)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    edit_json(artifact / "tokenizer.json", lambda t: t.update(pre_tokenizer=split))
    if pattern.endswith("$"):
        terminal.refuses("generate", str(artifact), "w" * 60 + "!", "--new-tokens", "2", parts=("tokenizer",))
    else:  # the library finds no match soon: no error, and no hang
        assert run(["generate", str(artifact), "w" * 60, "--new-tokens", "2", "--threads", "1"]) in (0, 1)


# ------------------------------------------------------------------------------------------------------ real processes


@pytest.mark.parametrize(
    ("command", "damage"),
    [("verify", "a graph that is deep"), ("generate", "data above"), ("inspect", "a manifest with a key twice")],
)
def test_in_a_process_of_its_own(command: str, damage: str, artifact: Path, terminal: Terminal) -> None:
    """As users start it: real workers, an exit code, and no more than some hundred megabytes."""
    DAMAGES[damage][0](artifact)
    before = snapshot(terminal.root)
    limited = "import resource, sys\nresource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
    code = f"{limited}from compress.cli import main\nmain({[command, str(artifact), *COMMANDS[command]]!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len((done.stderr or done.stdout).strip().splitlines()) <= 6
    assert snapshot(terminal.root) == before


def test_a_graph_that_crashes_the_checker(
    artifact: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its process dies by a signal; verify says so, and of which graph, and goes on."""
    import compress.package.onnx_check as check

    monkeypatch.setattr(check, "BASE_MEMORY", 1 << 20)
    monkeypatch.setattr(check, "MEMORY_A_BYTE", 0)
    weights = onnx.helper.make_tensor("w", 1, [1 << 22], np.zeros(1 << 22, np.float32).tobytes(), raw=True)
    graph = onnx.helper.make_graph([], "g", [], [], [weights])
    (artifact / "large.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    agree(artifact)
    assert run(["verify", str(artifact)]) == 1
    out = capsys.readouterr().out
    assert "large.onnx" in out and "Traceback" not in out
