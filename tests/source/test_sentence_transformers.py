"""Sentence-transformers directories: their files in every source kind, and what their pooling says."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from sample_hub import fill_cache
from sample_package import install

from compress.contracts import Checkpoint
from compress.errors import CompressError, SourceError, UnsupportedModelError
from compress.source import OpenCheckpoint, open_checkpoint, require_tokenizer
from compress.source.sentence_transformers import Pooling, read_pooling

CHAIN = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
OLD_POOLING = {
    "word_embedding_dimension": 384,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": True,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
}
SETTINGS = {"max_seq_length": 256, "do_lower_case": False}
NAMES = {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"}


def write(directory: Path, name: str, document: Any) -> None:
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text(document if isinstance(document, str) else json.dumps(document))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory as all-MiniLM-L6-v2 is published, its weights apart."""
    path = tmp_path / "model"
    path.mkdir()
    write(path, "config.json", {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 384})
    save_file({"embeddings.LayerNorm.weight": np.ones(384, np.float32)}, path / "model.safetensors")
    write(path, "vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword\n")
    write(path, "modules.json", CHAIN)
    write(path, "1_Pooling/config.json", OLD_POOLING)
    write(path, "sentence_bert_config.json", SETTINGS)
    write(path, "config_sentence_transformers.json", {"__version__": {"sentence_transformers": "2.0.0"}})
    return path


def pooling_of(directory: Path) -> Pooling | None:
    with open_checkpoint(str(directory)) as checkpoint:
        return read_pooling(checkpoint)


def refused(directory: Path, kind: type[CompressError], match: str, where: str) -> None:
    with open_checkpoint(str(directory)) as checkpoint, pytest.raises(kind, match=match) as caught:
        read_pooling(checkpoint)
    assert caught.value.where == where
    assert len(caught.value.render()) < 500


# ------------------------------------------------------------------------------------------------ files of the source


def as_directory(model: Path, patch: pytest.MonkeyPatch) -> OpenCheckpoint:
    return open_checkpoint(str(model))


def as_hub(model: Path, patch: pytest.MonkeyPatch) -> OpenCheckpoint:
    fill_cache(model.parent / "hub", model, "owner/sentences")
    return open_checkpoint("owner/sentences", cache_dir=model.parent / "hub")


def as_package(model: Path, patch: pytest.MonkeyPatch) -> OpenCheckpoint:
    install(model.parent / "site", model, name="sentence_package")
    patch.syspath_prepend(str(model.parent / "site"))
    return open_checkpoint("package:sentence_package/model")


@pytest.mark.parametrize("source", [as_directory, as_hub, as_package])
def test_every_kind_hands_on_the_files(
    source: Callable[[Path, pytest.MonkeyPatch], OpenCheckpoint], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with source(directory, monkeypatch) as checkpoint:
        side = checkpoint.sidecars()
        assert set(side) == NAMES | {"vocab.txt"}
        for name in side:
            assert side[name].read_bytes() == (directory / name).read_bytes()
        digests = {file.name: file.sha256 for file in checkpoint.files()}
        expected = hashlib.sha256((directory / "1_Pooling" / "config.json").read_bytes()).hexdigest()
        assert digests["1_Pooling/config.json"] == expected
        assert set(digests) == {*side, "config.json", "model.safetensors"}
        assert read_pooling(checkpoint) == Pooling("mean", True, 256, False)
        require_tokenizer(checkpoint)


def test_the_config_alone_brings_them_too(directory: Path, tmp_path: Path) -> None:
    fill_cache(tmp_path / "hub", directory, "owner/sentences", leave_out=("model.safetensors", "vocab.txt"))
    with open_checkpoint("owner/sentences", cache_dir=tmp_path / "hub", config_only=True) as checkpoint:
        assert set(checkpoint.sidecars()) == NAMES
        assert read_pooling(checkpoint) is not None


def test_other_checkpoints_have_none_of_it(tiny_model: Callable[[str], Path]) -> None:
    with open_checkpoint(str(tiny_model("llama"))) as checkpoint:
        assert not set(checkpoint.sidecars()) & NAMES
        assert read_pooling(checkpoint) is None


@pytest.mark.parametrize("link", ["1_Pooling", "1_Pooling/config.json", "modules.json"])
def test_links_that_lead_outside(directory: Path, link: str) -> None:
    secret = directory.parent / "secret"
    shutil.move(directory / link, secret)
    (directory / link).symlink_to(secret)
    with open_checkpoint(str(directory)) as checkpoint:
        with pytest.raises(SourceError, match="symbolic link leads outside"):
            checkpoint.sidecars()
        with pytest.raises(SourceError, match="symbolic link leads outside"):
            read_pooling(checkpoint)


def test_a_folder_in_place_of_the_file(directory: Path) -> None:
    (directory / "1_Pooling" / "config.json").unlink()
    (directory / "1_Pooling" / "config.json").mkdir()
    with open_checkpoint(str(directory)) as checkpoint, pytest.raises(SourceError, match="not a regular file"):
        checkpoint.sidecars()


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        (["vocab.txt"], False),
        (["spiece.model"], False),
        (["tokenizer.json"], False),
        (["tokenizer_config.json", "special_tokens_map.json"], True),
    ],
)
def test_tokenizers_of_encoders(directory: Path, files: list[str], missing: bool) -> None:
    (directory / "vocab.txt").unlink()
    for name in files:
        write(directory, name, "{}")
    with open_checkpoint(str(directory)) as checkpoint:
        if missing:
            with pytest.raises(SourceError, match="the tokenizer is missing"):
                require_tokenizer(checkpoint)
        else:
            require_tokenizer(checkpoint)


def test_an_adapters_own_chain_replaces_the_bases_whole(directory: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    base = "encoder.layer.0.attention.self.query"
    save_file({f"{base}.weight": np.ones((384, 384), np.float32)}, directory / "model.safetensors")
    write(adapter, "adapter_config.json", {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": "x"})
    factors = {"A": np.ones((1, 384), np.float32), "B": np.ones((384, 1), np.float32)}
    save_file(
        {f"base_model.model.{base}.lora_{name}.weight": value for name, value in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    write(adapter, "modules.json", CHAIN[:2])
    write(adapter, "1_Pooling/config.json", {"embedding_dimension": 384, "pooling_mode": "cls"})
    with open_checkpoint(str(directory), adapter=adapter) as checkpoint:
        assert set(checkpoint.sidecars()) == {"vocab.txt", "modules.json", "1_Pooling/config.json"}
        assert read_pooling(checkpoint) == Pooling("cls", False, None, False)
        assert "adapter/1_Pooling/config.json" in [file.name for file in checkpoint.files()]


# ---------------------------------------------------------------------------------------------------- what they say


@pytest.mark.parametrize(
    ("modules", "pooling", "settings", "expected"),
    [
        (CHAIN, OLD_POOLING, SETTINGS, Pooling("mean", True, 256, False)),
        (CHAIN[:2], OLD_POOLING, SETTINGS, Pooling("mean", False, 256, False)),
        (CHAIN[:1], None, SETTINGS, Pooling("none", False, 256, False)),
        (CHAIN[:2], {"pooling_mode_cls_token": True}, {}, Pooling("cls", False, None, False)),
        (CHAIN, {"pooling_mode_max_tokens": True}, {"max_seq_length": None}, Pooling("max", True, None, False)),
        (CHAIN, {"pooling_mode": "mean", "include_prompt": True}, {}, Pooling("mean", True, None, False)),
        (CHAIN, {"embedding_dimension": 384, "pooling_mode": "cls"}, {}, Pooling("cls", True, None, False)),
        # Both forms: the newer one counts, as in the package.
        (CHAIN, {"pooling_mode": ["max"], "pooling_mode_mean_tokens": True}, {}, Pooling("max", True, None, False)),
        (CHAIN[:1], None, {"max_seq_length": 1, "do_lower_case": True}, Pooling("none", False, 1, True)),
    ],
)
def test_what_is_known(
    directory: Path, modules: Any, pooling: Any, settings: dict[str, Any], expected: Pooling
) -> None:
    write(directory, "modules.json", modules)
    shutil.rmtree(directory / "1_Pooling")
    if pooling is not None:
        write(directory, "1_Pooling/config.json", pooling)
    write(directory, "sentence_bert_config.json", settings)
    assert pooling_of(directory) == expected


def test_where_newer_and_older_releases_put_things(directory: Path) -> None:
    kinds = {
        "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
        "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    }
    write(directory, "modules.json", [entry | {"type": kinds[entry["type"].split(".")[-1]]} for entry in CHAIN])
    write(directory, "2_Normalize/config.json", {"module_input_name": "sentence_embedding"})
    (directory / "sentence_bert_config.json").rename(directory / "sentence_distilbert_config.json")
    assert pooling_of(directory) == Pooling("mean", True, 256, False)
    (directory / "sentence_distilbert_config.json").unlink()
    assert pooling_of(directory) == Pooling("mean", True, None, False)


def test_a_directory_without_modules_has_no_pooling(directory: Path) -> None:
    (directory / "modules.json").unlink()
    assert pooling_of(directory) is None


DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}


@pytest.mark.parametrize(
    ("modules", "match"),
    [
        ([*CHAIN[:2], DENSE], "module 'sentence_transformers.models.Dense'"),
        ([*CHAIN[:2], DENSE | {"type": "evil.Pooling"}], "module 'evil.Pooling'"),
        ([*CHAIN[:2], DENSE | {"type": "sentence_transformers_.Normalize"}], "only Transformer, Pooling"),
        ([CHAIN[0] | {"path": "0_Transformer"}, *CHAIN[1:]], "lie in '0_Transformer'; only '' is known"),
        ([CHAIN[0], CHAIN[1] | {"path": "../../secret"}], r"lie in '\.\./\.\./secret'; only '1_Pooling'"),
        ([CHAIN[0], CHAIN[1] | {"path": "/etc"}], "lie in '/etc'"),
        ([CHAIN[0], CHAIN[2]], "in no order that is known"),
        ([CHAIN[1], CHAIN[0]], "the modules Pooling, Transformer are in no order"),
        ([*CHAIN[:2], *CHAIN[1:]], "in no order"),
        ([], r"the modules \(none\)"),
        ([CHAIN[0] | {"type": "sentence_transformers.models." + "X" * 10_000}], "module 'sentence_transformers"),
    ],
)
def test_chains_that_are_not_known(directory: Path, modules: Any, match: str) -> None:
    write(directory, "modules.json", modules)
    refused(directory, UnsupportedModelError, match, "modules.json")


@pytest.mark.parametrize(
    ("pooling", "match"),
    [
        (OLD_POOLING | {"pooling_mode_cls_token": True}, r"several poolings are joined \(cls, mean\)"),
        ({"pooling_mode": ["mean", "max"]}, r"several poolings are joined \(mean, max\)"),
        ({"pooling_mode": "weightedmean"}, "'weightedmean' has no implementation; known: mean, cls, max"),
        ({"pooling_mode_lasttoken": True}, "'lasttoken' has no implementation"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "'mean_sqrt_len_tokens' has no implementation"),
        ({"pooling_mode": "x" * 10_000}, "pooling mode 'xxx"),
        (OLD_POOLING | {"include_prompt": False}, "leaves out the prompt's tokens"),
    ],
)
def test_poolings_that_are_not_known(directory: Path, pooling: Any, match: str) -> None:
    write(directory, "1_Pooling/config.json", pooling)
    refused(directory, UnsupportedModelError, match, "1_Pooling/config.json")


def test_a_normalisation_of_something_else(directory: Path) -> None:
    write(directory, "2_Normalize/config.json", {"module_input_name": "token_embeddings"})
    refused(directory, UnsupportedModelError, "module_input_name is 'token_embeddings'", "2_Normalize/config.json")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("modules.json", "[", "not JSON"),
        ("modules.json", {"0": CHAIN[0]}, "holds a dict, not a list"),
        ("modules.json", "[" * 100 + "]" * 100, "nested too deeply"),
        ("modules.json", [["sentence_transformers.models.Transformer"]], "entry 0 has no type"),
        ("modules.json", [CHAIN[0], {"path": "1_Pooling"}], "entry 1 has no type or no path"),
        ("modules.json", [CHAIN[0] | {"path": None}], "entry 0 has no type or no path"),
        ("modules.json", [CHAIN[0] | {"type": 7}], "entry 0 has no type"),
        ("1_Pooling/config.json", "", "not JSON"),
        ("1_Pooling/config.json", "[]", "holds a list, not an object"),
        ("1_Pooling/config.json", {}, "no pooling mode is turned on"),
        ("1_Pooling/config.json", OLD_POOLING | {"pooling_mode_mean_tokens": False}, "no pooling mode is turned on"),
        ("1_Pooling/config.json", {"pooling_mode": []}, "no pooling mode is turned on"),
        ("1_Pooling/config.json", {"pooling_mode": 3}, "pooling_mode is not a name"),
        ("1_Pooling/config.json", {"pooling_mode": None}, "pooling_mode is not a name"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": "yes"}, "'yes', not true or false"),
        ("1_Pooling/config.json", OLD_POOLING | {"include_prompt": 1}, "include_prompt is '1'"),
        ("1_Pooling/config.json", OLD_POOLING | {"word_embedding_dimension": 768}, "vectors of 768, the model has 384"),
        ("sentence_bert_config.json", "{", "not JSON"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length is '0'"),
        ("sentence_bert_config.json", {"max_seq_length": True}, "max_seq_length is 'True'"),
        ("sentence_bert_config.json", {"max_seq_length": "256"}, "max_seq_length is '256'"),
        ("sentence_bert_config.json", {"do_lower_case": "no"}, "do_lower_case is 'no'"),
    ],
)
def test_damaged_files(directory: Path, name: str, content: Any, match: str) -> None:
    write(directory, name, content)
    refused(directory, SourceError, match, name)


def test_settings_that_are_missing(directory: Path) -> None:
    (directory / "1_Pooling" / "config.json").unlink()
    refused(directory, SourceError, "the pooling's settings are missing", "1_Pooling/config.json")


def test_only_side_files_are_opened(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that modules.json names is opened by that name."""
    opened: set[Path] = set()
    real = os.open

    def watched(path: Any, *args: Any, **options: Any) -> int:
        opened.add(Path(path))
        return real(path, *args, **options)

    checkpoint: Checkpoint = open_checkpoint(str(directory))
    files = checkpoint.sidecars()  # looks how large each of them is
    monkeypatch.setattr(checkpoint, "sidecars", lambda: files)
    monkeypatch.setattr(os, "open", watched)
    read_pooling(checkpoint)
    assert {path.relative_to(directory).as_posix() for path in opened} == NAMES - {"config_sentence_transformers.json"}
