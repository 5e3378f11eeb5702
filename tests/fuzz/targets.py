"""What reads bytes that somebody else made: one function a parser, which may only end well or by a ``CompressError``.

Nothing here knows how cases are made: hypothesis (``test_fuzz.py``), ``tools/fuzz.py`` and atheris all call these.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.contracts import TensorInfo
from compress.errors import CompressError

#: Elements of a tensor beyond which only its first row is read.
_WHOLE = 1 << 16


@functools.cache
def place() -> Path:
    """Return a folder of this process's own, which goes with it."""
    root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="compress-fuzz-", dir=root))
    weakref.finalize(place, shutil.rmtree, path, True)
    return path


def _folder(name: str) -> Path:
    path = place() / name
    path.mkdir(exist_ok=True)
    return path


def _file(folder: str, name: str, data: bytes) -> Path:
    path = _folder(folder) / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def _object(data: bytes) -> dict[str, Any]:
    from compress.source.files import parse_json

    value = parse_json(data, "case")
    if not isinstance(value, dict):
        raise CompressError("not an object")
    return value


def _read_all(checkpoint: Any) -> None:
    """Read the first tensors of what has ``tensors`` and ``read``; those that are refused stay unread."""
    found: Mapping[str, TensorInfo] = checkpoint.tensors() if callable(checkpoint.tensors) else checkpoint.tensors
    for name, info in list(found.items())[:16]:
        rows = None if np.prod(info.shape, dtype=object) <= _WHOLE else 1
        with contextlib.suppress(CompressError):
            checkpoint.read(name, 0, rows)


# ---------------------------------------------------------------------------------------------------------- documents


def json_document(data: bytes) -> None:
    from compress.source.files import parse_json

    parse_json(data, "case")


def config(data: bytes) -> None:
    """A ``config.json``: what is read of it before any weight is, by whatever family it names."""
    from compress.families import load_family
    from compress.source.base import check_config
    from compress.validation.labels import label_names

    found = _object(data)
    check_config(found, where="config.json")
    load_family(found).describe(found, {})
    label_names(found)


def generation_config(data: bytes) -> None:
    from compress.prompts import end_tokens

    _file("generation", "generation_config.json", data)
    end_tokens(_folder("generation"))


def index(data: bytes) -> None:
    from compress.source.local_directory import DirectoryCheckpoint

    folder = _folder("index")
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "llama"}')
        _tensors(folder / "one.safetensors", {"a": np.ones((2, 2), np.float32)})
        _tensors(folder / "two.safetensors", {"b": np.ones((2, 2), np.float32)})
    _file("index", "model.safetensors.index.json", data)
    with DirectoryCheckpoint(folder, reference="case") as checkpoint:
        _read_all(checkpoint)


def _tensors(path: Path, arrays: Mapping[str, Any]) -> None:
    from safetensors.numpy import save_file

    save_file(dict(arrays), path)


def sentence_transformers(data: bytes) -> None:
    """``modules.json`` and ``1_Pooling/config.json``, one after the other with a NUL between."""
    from compress.source.local_directory import DirectoryCheckpoint
    from compress.source.sentence_transformers import read_pooling

    first, _, second = data.partition(b"\0")
    folder = _folder("sentences")
    (folder / "config.json").write_text('{"model_type": "bert", "hidden_size": 64}')
    _file("sentences", "modules.json", first)
    _file("sentences", "1_Pooling/config.json", second)
    with DirectoryCheckpoint(folder, reference="case", weights="ignore") as checkpoint:
        read_pooling(checkpoint)


def adapter_config(data: bytes) -> None:
    from compress.source.adapter_config import load_adapter_config

    _file("adapter-config", "adapter_config.json", data)
    found = load_adapter_config(_folder("adapter-config"), "adapter_config.json")
    found.scaling("model.layers.0.self_attn.q_proj", found.rank or 1)


def manifest(data: bytes) -> None:
    from compress.package.manifest import read_manifest
    from compress.package.manifest_schema import parse_manifest
    from compress.profile import parse_stored_profile
    from compress.report import tensors

    _file("manifest", "manifest.json", data)
    record = read_manifest(_folder("manifest"))
    parse_manifest(record)
    parse_stored_profile(record["profile"], where="manifest.json")
    tensors.of_manifest(record, "manifest.json")


def report(data: bytes) -> None:
    from compress.report import json as report_json
    from compress.report.html import page
    from compress.report.terminal import show

    found = report_json.read(_file("report", "report.json", data))
    from rich.console import Console

    show(found, Console(file=io.StringIO(), width=120))
    page(found)


def bill_of_materials(data: bytes) -> None:
    from compress.package.sbom import read_digests

    read_digests(_file("bill", "sbom.cdx.json", data))


def signature(data: bytes) -> None:
    from compress.package.signing import _bundle

    _bundle(data)


def profile(data: bytes) -> None:
    from compress.profile import load_profile

    load_profile(str(_file("profile", "case.toml", data)))


def labels(data: bytes) -> None:
    from compress.validation.labels import read_examples

    path = _file("labels", "case.jsonl", data)
    for task, about in (
        ("embedding", {}),
        ("text-classification", {"id2label": {"0": "bad", "1": "good"}}),
        ("text-classification", {"id2label": {"0": "score"}}),
    ):
        try:
            read_examples(path, task, about)
        except CompressError:
            continue


def text(data: bytes) -> None:
    from compress.validation.pieces import cut
    from compress.validation.text import from_file

    path = _file("text", "case.txt", data)
    cut(from_file(path, 16).content, 64)
    from_file(path, 16, excerpts=3)


# --------------------------------------------------------------------------------------------------------- containers


def safetensors(data: bytes) -> None:
    from compress.source.safetensors_file import SafetensorsFile

    found = SafetensorsFile(_file("safetensors", "case.safetensors", data))
    try:
        _read_all(found)
    finally:
        found.close()


def gguf(data: bytes) -> None:
    from compress.source.gguf_file import GgufCheckpoint

    with GgufCheckpoint(_file("gguf", "case.gguf", data), reference="case") as checkpoint:
        _read_all(checkpoint)


def adapter(data: bytes) -> None:
    """``adapter_model.safetensors`` over a base of two matrices."""
    from compress.source.adapter import merge_adapter
    from compress.source.local_directory import DirectoryCheckpoint

    base, own = _folder("base"), _folder("adapter")
    if not (base / "config.json").exists():
        (base / "config.json").write_text('{"model_type": "llama"}')
        names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight")
        _tensors(base / "model.safetensors", {name: np.ones((8, 8), np.float32) for name in names})
        (own / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    _file("adapter", "adapter_model.safetensors", data)
    with (
        DirectoryCheckpoint(base, reference="case") as whole,
        merge_adapter(whole, own) as merged,
    ):
        _read_all(merged)


def kept_ids(data: bytes) -> None:
    from compress.prune.run import read_kept

    read_kept(_file("kept", "kept_ids.npy", data), 64)


# ------------------------------------------------------------------------------------------------------------- graphs


def onnx_graph(data: bytes) -> None:
    """What ``verify`` asks of a graph, in this process: a crash of the checker shall show."""
    from compress.package.onnx_check import check_graph
    from compress.package.tree import scan

    _file("graph", "model.onnx", data)
    _file("graph", "model.onnx.data", bytes(256))
    check_graph(_folder("graph"), "model.onnx", scan(_folder("graph")))


def external_data(data: bytes) -> None:
    """What is asked of a graph before it is loaded, and where its weights are."""
    from compress.package.external import data_files
    from compress.package.onnx_check import check_places

    path = _file("graph", "model.onnx", data)
    _file("graph", "model.onnx.data", bytes(256))
    check_places(path)
    data_files(path)


def inspected_graph(data: bytes) -> None:
    from compress.inspection import inspect_document

    _file("inspected", "model.onnx", data)
    json.dumps(inspect_document(_folder("inspected")))


def genai_config(data: bytes) -> None:
    from compress.validation.artifact import open_artifact

    folder = _folder("genai")
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 64}')
        (folder / "model.onnx").write_bytes(b"")
    _file("genai", "genai_config.json", data)
    open_artifact(folder)


# ----------------------------------------------------------------------------------------------------------- programs


def tokenizer(data: bytes) -> None:
    """A ``tokenizer.json``: read as pruning reads it, and run on two lines."""
    from compress.tokens import Tokenizer

    with Tokenizer(path=_file("tokenizer", "tokenizer.json", data)) as found:
        found.encode([("def f(x): return  x\n12.5 \N{EURO SIGN}", None), ("a" * 200, "b")], special=True)
        found.decode([0, 1, 2, 3])


def trimmed_tokenizer(data: bytes) -> None:
    from compress.prune._tokenizer_json import read_tokenizer

    _file("trimmed", "tokenizer.json", data)
    read_tokenizer(_folder("trimmed"))


def chat_template(data: bytes) -> None:
    from compress.tokens import render_chat

    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    render_chat(
        data.decode("utf-8", "replace"),
        {"messages": messages, "bos_token": "<s>", "add_generation_prompt": True, "tools": None},
    )


_ALL: tuple[Callable[[bytes], None], ...] = (
    adapter, adapter_config, bill_of_materials, chat_template, config, external_data, genai_config, generation_config,
    gguf, index, inspected_graph, json_document, kept_ids, labels, manifest, onnx_graph, profile, report, safetensors,
    sentence_transformers, signature, text, tokenizer, trimmed_tokenizer,
)  # fmt: skip
TARGETS: Mapping[str, Callable[[bytes], None]] = {target.__name__: target for target in _ALL}


def run(name: str, data: bytes) -> bool:
    """Run a case; returns whether it was accepted, ``False`` where it was refused as it should be.

    Raises:
        BaseException: Anything but a ``CompressError`` that its parser raised, or one that cannot be shown.
    """
    try:
        TARGETS[name](data)
    except CompressError as error:
        shown = str(error)
        shown.encode("utf-8")
        assert error.what.strip(), "an error without words"
        assert len(shown) < 12_000 and len(shown.splitlines()) <= 40, "an error that floods the terminal"
        return False
    return True
