"""Hub ids, without a network: a cache laid out by hand, and errors as huggingface_hub raises them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file
from sample_hub import COMMIT, fill_cache

from compress.errors import CompressError, ResourceError, SourceError
from compress.source import open_checkpoint, require_tokenizer
from compress.source.hub import ALL_PATTERNS, CONFIG_PATTERNS, IGNORED_PATTERNS

Tiny = Callable[[str], Path]
HUB_ID = "owner/tiny"


def test_tests_are_offline() -> None:
    assert constants.HF_HUB_OFFLINE


def test_from_the_cache_at_a_resolved_commit(tmp_path: Path, tiny_model: Tiny) -> None:
    fill_cache(tmp_path, tiny_model("llama"), HUB_ID)
    for revision in (None, "main", COMMIT):
        with open_checkpoint(HUB_ID, revision=revision, cache_dir=tmp_path) as checkpoint:
            assert (checkpoint.kind, checkpoint.identifier, checkpoint.revision) == ("hub", HUB_ID, COMMIT)
            require_tokenizer(checkpoint)
            name, value = next(iter(load_file(tiny_model("llama") / "model.safetensors").items()))
            np.testing.assert_array_equal(checkpoint.read(name), value)


def test_only_what_is_needed_is_fetched(tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = fill_cache(tmp_path, tiny_model("llama"), HUB_ID)
    asked: dict[str, Any] = {}

    def download(hub_id: str, **options: Any) -> str:
        asked.update(options, hub_id=hub_id)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    open_checkpoint(HUB_ID, revision="v2", cache_dir=tmp_path)
    assert asked["hub_id"] == HUB_ID and asked["revision"] == "v2" and asked["cache_dir"] == tmp_path
    assert asked["allow_patterns"] == ALL_PATTERNS and asked["ignore_patterns"] == IGNORED_PATTERNS
    open_checkpoint(HUB_ID, config_only=True)
    assert asked["allow_patterns"] == CONFIG_PATTERNS


def test_patterns() -> None:
    """A repository's files, through huggingface_hub's own filter."""
    wanted = [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
    ]
    unwanted = [
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "model.onnx",
        "onnx/model.onnx",
        "tf_model.h5",
        "model-q4.gguf",
        "original/consolidated.00.pth",
        "original/tokenizer.model",
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "fp16/model.safetensors",
        "model-x/y-of-2.safetensors",
        "flax_model.msgpack",
        "modeling_own.py",
        "onnx/README.md",
        "training_args.bin",
        ".gitattributes",
        "onnx/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "x/1_Pooling/config.json",
    ]
    passed = filter_repo_objects(wanted + unwanted, allow_patterns=ALL_PATTERNS, ignore_patterns=IGNORED_PATTERNS)
    assert list(passed) == wanted
    passed = filter_repo_objects(wanted + unwanted, allow_patterns=CONFIG_PATTERNS, ignore_patterns=IGNORED_PATTERNS)
    assert list(passed) == ["config.json", *wanted[-4:]]


def test_config_only(tmp_path: Path, tiny_model: Tiny) -> None:
    fill_cache(tmp_path, tiny_model("llama"), HUB_ID, leave_out=("model.safetensors",))
    checkpoint = open_checkpoint(HUB_ID, cache_dir=tmp_path, config_only=True)
    assert not checkpoint.has_weights and not checkpoint.tensors() and checkpoint.config["model_type"] == "llama"
    with pytest.raises(SourceError, match="no safetensors weights; pickled ones are not fetched"):
        open_checkpoint(HUB_ID, cache_dir=tmp_path)


def test_config_only_uses_weights_that_are_cached_whole(tmp_path: Path, tiny_model: Tiny) -> None:
    snapshot = fill_cache(tmp_path, tiny_model("llama"), HUB_ID)
    assert open_checkpoint(HUB_ID, cache_dir=tmp_path, config_only=True).has_weights
    # Half a download: one shard of two.
    (snapshot / "model.safetensors").unlink()
    save_file({"a": np.ones(2, np.float32)}, snapshot / "model-1.safetensors")
    (snapshot / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    )
    assert not open_checkpoint(HUB_ID, cache_dir=tmp_path, config_only=True).has_weights
    with pytest.raises(SourceError, match="a file of the model is missing"):
        open_checkpoint(HUB_ID, cache_dir=tmp_path)


def test_offline_and_not_cached(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not in the cache, and HF_HUB_OFFLINE is set") as caught:
        open_checkpoint(HUB_ID, cache_dir=tmp_path)
    assert "hf download owner/tiny" in str(caught.value.hint)


def http_error(kind: type[Exception], status: int) -> Exception:
    response = Mock(headers={}, status_code=status)
    return kind("what the hub said", response=response)


@pytest.mark.parametrize(
    ("error", "match", "hint", "kind"),
    [
        (lambda: http_error(errors.GatedRepoError, 403), "the model is gated", "HF_TOKEN", SourceError),
        (lambda: http_error(errors.RepositoryNotFoundError, 404), "no such model", "spelling", SourceError),
        (lambda: http_error(errors.RevisionNotFoundError, 404), "no revision 'v9'", "branch", SourceError),
        (lambda: http_error(errors.HfHubHTTPError, 500), "cannot be fetched: what the hub said", "again", SourceError),
        (lambda: OSError(errno.ENOSPC, "No space left"), "the disk is full", "HF_HOME", ResourceError),
        (lambda: errors.OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE is set", "hf download", SourceError),
        (lambda: ValueError(""), "cannot be fetched: ValueError", "again", SourceError),
    ],
)
def test_what_the_hub_answers(
    error: Callable[[], Exception], match: str, hint: str, kind: type[CompressError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(kind, match=match) as caught:
        open_checkpoint(HUB_ID, revision="v9")
    assert hint in str(caught.value.hint) and caught.value.where == HUB_ID
    assert len(caught.value.render().splitlines()) == 3


def test_no_connection_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise errors.LocalEntryNotFoundError("cannot connect")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(SourceError, match="not in the cache, and the hub cannot be reached"):
        open_checkpoint(HUB_ID)


def test_an_existing_directory_is_no_hub_id(tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "tiny").symlink_to(tiny_model("llama"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert open_checkpoint(HUB_ID).kind == "directory"


@pytest.mark.parametrize("reference", ["a/b/c", "owner/", "/owner/x", "own er/x", "../x", "owner/..", "-o/x"])
def test_what_is_no_hub_id_is_not_asked_for(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(SourceError):
        open_checkpoint(reference)
