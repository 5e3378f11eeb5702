"""Model directories: sharding, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from compress.errors import CompressError, SourceError, UnsupportedModelError, UsageError
from compress.source import open_checkpoint, require_tokenizer

Make = Callable[..., Path]
INDEX = "model.safetensors.index.json"
SHARDS = {"model-1.safetensors": ["a.weight", "c.bias"], "model-2.safetensors": ["b.weight"]}


def refused(reference: Path, match: str, kind: type[CompressError] = SourceError, **options: object) -> CompressError:
    with pytest.raises(kind, match=match) as caught:
        open_checkpoint(str(reference), **options)  # type: ignore[arg-type]
    assert len(caught.value.render().splitlines()) <= 3
    assert str(reference.parent) not in caught.value.what
    return caught.value


def edit_index(directory: Path, **weight_map: object) -> None:
    path = directory / INDEX
    index = json.loads(path.read_text())
    index["weight_map"] |= {name.replace("__", "."): value for name, value in weight_map.items()}
    path.write_text(json.dumps(index))


def test_shards_read_like_one_file(model_directory: Make, weights: dict[str, np.ndarray]) -> None:
    with open_checkpoint(str(model_directory(shards=SHARDS))) as checkpoint:
        assert set(checkpoint.tensors()) == set(weights)
        for name, value in weights.items():
            np.testing.assert_array_equal(checkpoint.read(name), value)
        assert [file.name for file in checkpoint.files()] == sorted(["config.json", INDEX, *SHARDS])


def test_a_single_file_wins_over_an_index_as_in_transformers(model_directory: Make) -> None:
    directory = model_directory(shards=SHARDS)
    save_file({"only": np.ones(2, np.float32)}, directory / "model.safetensors")
    assert set(open_checkpoint(str(directory)).tensors()) == {"only"}


@pytest.mark.parametrize("outside", ["../secret.safetensors", "sub/../../secret.safetensors", "..\\secret", "C:\\x"])
def test_an_index_that_leads_outside(model_directory: Make, outside: str) -> None:
    directory = model_directory(shards=SHARDS)
    save_file({"a.weight": np.ones(2, np.float32)}, directory.parent / "secret.safetensors")
    edit_index(directory, a__weight=outside)
    assert INDEX in str(refused(directory, "outside the model's directory").where)


def test_an_index_with_an_absolute_path(model_directory: Make) -> None:
    directory = model_directory(shards=SHARDS)
    secret = directory.parent / "secret.safetensors"
    save_file({"a.weight": np.ones(2, np.float32)}, secret)
    edit_index(directory, a__weight=str(secret))
    with pytest.raises(SourceError, match="outside the model's directory"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("name", ["model-1.safetensors", "config.json"])
def test_a_link_that_leads_outside(model_directory: Make, name: str) -> None:
    directory = model_directory(shards=SHARDS)
    shutil.move(directory / name, directory.parent / "secret")
    (directory / name).symlink_to(directory.parent / "secret")
    refused(directory, "symbolic link leads outside")


def test_a_link_of_a_side_file_that_leads_outside(model_directory: Make) -> None:
    directory = model_directory()
    (directory.parent / "secret").write_text("a key")
    (directory / "tokenizer.json").symlink_to(directory.parent / "secret")
    checkpoint = open_checkpoint(str(directory))
    with pytest.raises(SourceError, match="symbolic link leads outside"):
        checkpoint.sidecars()


def test_links_inside_and_a_linked_directory_are_fine(model_directory: Make, weights: dict[str, np.ndarray]) -> None:
    directory = model_directory(shards=SHARDS)
    (directory / "model-1.safetensors").rename(directory / "blob")
    (directory / "model-1.safetensors").symlink_to("blob")
    (directory.parent / "alias").symlink_to(directory)
    checkpoint = open_checkpoint(str(directory.parent / "alias"))
    np.testing.assert_array_equal(checkpoint.read("a.weight"), weights["a.weight"])
    assert checkpoint.identifier == "model"


def test_a_snapshot_may_link_into_its_own_blobs_only(model_directory: Make) -> None:
    directory = model_directory()
    repository = directory.parent / "models--o--n"
    snapshot = repository / "snapshots" / "c0ffee"
    (repository / "blobs").mkdir(parents=True)
    snapshot.parent.mkdir()
    directory.rename(snapshot)
    shutil.move(snapshot / "model.safetensors", repository / "blobs" / "1")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    assert open_checkpoint(str(snapshot)).has_weights
    # Negative control: the same link, one folder further.
    shutil.move(repository / "blobs" / "1", repository / "1")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../1")
    refused(snapshot, "symbolic link leads outside")


def test_a_named_pipe_does_not_hang(model_directory: Make) -> None:
    directory = model_directory()
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")
    refused(directory, "not a regular file")


def test_a_missing_shard(model_directory: Make) -> None:
    directory = model_directory(shards=SHARDS)
    (directory / "model-2.safetensors").unlink()
    assert "model-2.safetensors" in str(refused(directory, "missing").where)


def test_a_truncated_shard(model_directory: Make) -> None:
    directory = model_directory(shards=SHARDS)
    os.truncate(directory / "model-2.safetensors", (directory / "model-2.safetensors").stat().st_size - 1)
    assert refused(directory, "safetensors").where == "model-2.safetensors"


def test_an_index_that_disagrees_with_its_shards(model_directory: Make) -> None:
    directory = model_directory(shards=SHARDS)
    edit_index(directory, a__weight="model-2.safetensors")
    refused(directory, "the index says that tensor 'a.weight' is in 'model-2.safetensors'")


def test_a_tensor_in_two_shards(model_directory: Make) -> None:
    shards = {"model-1.safetensors": ["a.weight", "b.weight"], "model-2.safetensors": ["b.weight", "c.bias"]}
    refused(model_directory(shards=shards), "'b.weight' is in two shards")


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{", ""])
def test_an_index_that_is_none(model_directory: Make, index: str) -> None:
    directory = model_directory(shards=SHARDS)
    (directory / INDEX).write_text(index)
    assert refused(directory, "index|JSON").where == INDEX


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1]", "a list, not an object"),
        ("null", "not an object"),
        ('{"model_type": "' + "x" * (5 << 20) + '"}', "larger than 4 MiB"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested too deeply"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ("\xff\xfe\x00", "not JSON"),
        ('{"n": ' + "9" * 5000 + "}", "not JSON"),
        ("{}", "names no model_type"),
        ('{"model_type": 3}', "names no model_type"),
    ],
)
def test_configs_that_are_none(model_directory: Make, text: str, match: str) -> None:
    directory = model_directory()
    (directory / "config.json").write_bytes(text.encode("latin-1"))
    assert refused(directory, match).where == "config.json"


def test_config_missing(model_directory: Make) -> None:
    directory = model_directory()
    (directory / "config.json").unlink()
    refused(directory, "config.json is missing")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"already quantized \(gptq, 4 bits\)"),
        ({"quant_method": "awq"}, r"\(awq\)"),
        ({"load_in_8bit": True}, r"\(bitsandbytes\)"),
        ({"quant_method": "compressed-tensors"}, r"\(compressed-tensors\)"),
        ("odd", "unknown method"),
    ],
)
def test_quantized_checkpoints(model_directory: Make, config: object, match: str) -> None:
    assert refused(model_directory(quantization_config=config), match).hint


def test_no_quantization_is_no_quantization(model_directory: Make) -> None:
    assert open_checkpoint(str(model_directory(quantization_config=None))).has_weights


@pytest.mark.parametrize("name", ["l.qweight", "l.weight"])
def test_integer_weights(model_directory: Make, name: str) -> None:
    directory = model_directory()
    save_file({name: np.ones((2, 2), np.int8)}, directory / "model.safetensors")
    refused(directory, f"already quantized: tensor '{name}' is stored as I8")


def test_integer_buffers_do_no_harm(model_directory: Make) -> None:
    directory = model_directory()
    save_file({"position_ids": np.arange(4), "w": np.ones(2, np.float32)}, directory / "model.safetensors")
    assert open_checkpoint(str(directory)).read("w").sum() == 2


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "x.ckpt"])
def test_pickled_checkpoints(model_directory: Make, name: str) -> None:
    directory = model_directory()
    (directory / "model.safetensors").rename(directory / name)
    assert "save_pretrained" in str(refused(directory, "pickled only").hint)
    refused(directory, "pickled only", config_only=True)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("model.gguf", "no safetensors weights, but model.gguf"),
        ("tf_model.h5", "no safetensors weights, but tf_model.h5"),
        ("consolidated.safetensors", "neither model.safetensors nor"),
        ("adapter_config.json", "this is an adapter, not a model"),
        ("notes.txt", "the directory has no weights"),
    ],
)
def test_other_weights(model_directory: Make, name: str, match: str) -> None:
    directory = model_directory()
    (directory / "model.safetensors").rename(directory / name)
    refused(directory, match)


def test_code_of_the_models_own_is_never_run(model_directory: Make) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    directory = model_directory(model_type="own_architecture", auto_map=auto_map)
    (directory / "modeling_own.py").write_text("raise SystemExit('ran')\n")
    refused(directory, "needs Python code that comes with the model", UnsupportedModelError)
    # Phi-3's config names code too, but transformers has the model.
    assert open_checkpoint(str(model_directory("phi", model_type="phi3", auto_map=auto_map))).has_weights


def test_config_alone_is_enough_to_plan(model_directory: Make) -> None:
    directory = model_directory()
    full = open_checkpoint(str(directory), config_only=True)
    assert full.has_weights and full.tensors()
    (directory / "model.safetensors").unlink()
    refused(directory, "no weights")
    checkpoint = open_checkpoint(str(directory), config_only=True)
    assert not checkpoint.has_weights and not checkpoint.tensors()
    assert [file.name for file in checkpoint.files()] == ["config.json"]
    with pytest.raises(SourceError, match="no tensor"):
        checkpoint.read("a.weight")


def test_the_tokenizer_is_asked_for_separately(model_directory: Make) -> None:
    directory = model_directory()
    checkpoint = open_checkpoint(str(directory))
    (directory / "tokenizer_config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"the tokenizer is missing: none of tokenizer\.json"):
        require_tokenizer(checkpoint)
    (directory / "vocab.json").write_text("{}")
    with pytest.raises(SourceError, match="vocab.json with merges.txt"):
        require_tokenizer(checkpoint)
    (directory / "merges.txt").write_text("")
    require_tokenizer(checkpoint)
    assert set(checkpoint.sidecars()) == {"tokenizer_config.json", "vocab.json", "merges.txt"}


def test_references_that_lead_nowhere(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "the directory is empty")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "a file, not a model directory")
    for reference in ("", " ", "a\0b"):
        with pytest.raises(SourceError, match="empty or not a name"):
            open_checkpoint(reference)
    with pytest.raises(SourceError, match="not a model reference") as caught:
        open_checkpoint("no/such/thing/here")
    assert "hub id" in str(caught.value.hint) and "package:" in str(caught.value.hint)


def test_a_directory_has_no_revision(model_directory: Make) -> None:
    refused(model_directory(), "no revisions", UsageError, revision="main")


def test_importing_is_cheap() -> None:
    code = (
        "import sys, compress.source as s; s.sources(); "
        "print([m for m in ('torch', 'transformers', 'safetensors', 'huggingface_hub', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
