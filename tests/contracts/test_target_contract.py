"""What every packaging target does: says whom it takes, what it needs, refuses what it cannot, writes inside."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compress import pipeline
from compress.contracts import Decoder
from compress.errors import CompressError, ProviderError
from compress.package import load_target, manifest, targets
from compress.package.target import Needs, Package, Wish
from compress.planning import make_plan
from compress.profile import load_profile
from compress.source import open_checkpoint

MODELS = ("llama", "bert:embedding")


def names() -> list[str]:
    return sorted(targets())


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("target", names())
def test_it_says_whom_it_takes_and_what_it_needs(target: str, model: str, tiny_model: Callable[[str], Path]) -> None:
    module = load_target(target, where="here")
    assert target == module.TARGET
    assert module.__doc__ and target in module.__doc__, "the docstring says what is laid out where"
    with open_checkpoint(str(tiny_model(model))) as checkpoint:
        structure = pipeline.describe(checkpoint)
        profile = load_profile("arm-int4" if isinstance(structure, Decoder) else "x86-int8")
        wish = Wish(checkpoint, make_plan(structure, profile, checkpoint), profile)
        assert type(module.applies(structure)) is bool
        if module.applies(structure):
            needs = module.needs(wish)
            assert isinstance(needs, Needs)
            assert needs.disk >= 0 and needs.memory >= 0
            try:
                module.check(wish)
            except ProviderError as error:
                pytest.skip(str(error))
            except CompressError as error:
                assert error.hint, "a refusal says what to do"


@pytest.mark.parametrize("target", [name for name in names() if name != "qnn-context"])
def test_it_writes_inside_and_the_graph_stays_whole(
    target: str, model: str, tiny_model: Callable[[str], Path], tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    module = load_target(target, where="here")
    recipe = "arm-int4" if model == "llama" else "x86-int8"
    plain = tiny_artifact(model, recipe, "targets=[]")
    directory = tmp_path / "artifact"
    shutil.copytree(plain, directory)
    (directory / "manifest.json").unlink()
    with open_checkpoint(str(tiny_model(model))) as checkpoint:
        structure = pipeline.describe(checkpoint)
        if not module.applies(structure):
            pytest.skip(f"{target} does not take {model}")
        profile = load_profile(recipe)
        plan = make_plan(structure, profile, checkpoint)
        package = Package(checkpoint, plan, profile, directory, ("input_ids", "attention_mask"))
        module.check(package)
        module.write(package)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    assert not [path for path in directory.rglob(".*")], "nothing hidden is left"
    assert not [
        path for path in directory.rglob("*") if path.is_symlink() or path.stat().st_nlink > 1 and path.is_file()
    ]
    assert weights(plain) == weights(directory), "model.onnx still has every weight"


def weights(directory: Path) -> dict[str, str]:
    """Return a digest of every external tensor's bytes, by name."""
    from compress.package.external import external_tensors, load_graph, place

    found = {}
    for tensor in external_tensors(load_graph(directory / "model.onnx")):
        name, extent = place(tensor)
        with (directory / name).open("rb") as stream:
            stream.seek(extent.start)
            found[tensor.name] = hashlib.sha256(stream.read(extent.stop - extent.start)).hexdigest()
    assert found
    return found


def test_the_manifest_says_which_targets_took_it(tiny_artifact: Callable[..., Path]) -> None:
    record = manifest.read_manifest(tiny_artifact("bert:embedding", "x86-int8", 'targets=["genai", "optimum"]'))
    assert record["targets"] == ["optimum"], "onnxruntime-genai runs decoders"
