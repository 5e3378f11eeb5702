"""What an embedding is: the profile's word, else the sentence-transformers files', else the mean of unit length."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compress import pipeline, pooling
from compress.errors import SourceError, UnsupportedModelError
from compress.profile import load_profile
from compress.source import open_checkpoint
from compress.source.sentence_transformers import Pooling
from tiny_models import add_sentence_transformers


def resolve(directory: Path, *overrides: str) -> Pooling | None:
    with open_checkpoint(str(directory)) as checkpoint:
        return pooling.resolve(pipeline.describe(checkpoint), load_profile("x86-int8", overrides), checkpoint)


@pytest.fixture
def sentence(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a sentence-transformers directory of the tiny BERT."""

    def make(mode: str, *, normalize: bool) -> Path:
        directory = tmp_path / f"{mode}-{normalize}"
        shutil.copytree(tiny_model("bert:embedding"), directory)
        return add_sentence_transformers(directory, mode, normalize=normalize)

    return make


def test_without_a_word_it_is_the_mean_of_unit_length(tiny_model: Callable[[str], Path]) -> None:
    found = resolve(tiny_model("bert:embedding"))
    assert found == pooling.DEFAULT
    assert (found.mode, found.normalize) == ("mean", True)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_the_directory_says_it(mode: str, normalize: bool, sentence: Callable[..., Path]) -> None:
    found = resolve(sentence(mode, normalize=normalize))
    assert found == Pooling(mode=mode, normalize=normalize, max_length=32, lowercase=False)  # type: ignore[arg-type]


def test_the_profile_overrules_one_or_both(sentence: Callable[..., Path], tiny_model: Callable[[str], Path]) -> None:
    directory = sentence("cls", normalize=False)
    for overrides, expected in (
        (("graph.pooling=max",), ("max", False)),
        (("graph.normalize=yes",), ("cls", True)),
        (("graph.pooling=none",), ("none", False)),
        (("graph.pooling=mean", "graph.normalize=yes"), ("mean", True)),
    ):
        found = resolve(directory, *overrides)
        assert found is not None and (found.mode, found.normalize) == expected
    plain = resolve(tiny_model("bert:embedding"), "graph.pooling=cls", "graph.normalize=no")
    assert plain is not None and (plain.mode, plain.normalize) == ("cls", False)


def test_a_pooling_nobody_knows_is_refused_unless_it_is_overruled_whole(sentence: Callable[..., Path]) -> None:
    directory = sentence("mean", normalize=True)
    settings = json.loads((directory / "1_Pooling" / "config.json").read_text())
    changed = {**settings, "pooling_mode_mean_tokens": False, "pooling_mode_mean_sqrt_len_tokens": True}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(changed))
    for overrides in ((), ("graph.pooling=mean",), ("graph.normalize=no",)):
        with pytest.raises(UnsupportedModelError, match="mean_sqrt_len_tokens"):
            resolve(directory, *overrides)
    found = resolve(directory, "graph.pooling=mean", "graph.normalize=no")
    assert found is not None and (found.mode, found.normalize) == ("mean", False)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({**settings, "word_embedding_dimension": 65}))
    with pytest.raises(SourceError, match="the pooling is for vectors of 65, the model has 64"):
        resolve(directory)


def test_other_tasks_pool_nothing_and_decoders_have_none(tiny_model: Callable[[str], Path]) -> None:
    assert resolve(tiny_model("bert:fill-mask"), "graph.pooling=max") == pooling.NONE
    assert resolve(tiny_model("llama")) is None
