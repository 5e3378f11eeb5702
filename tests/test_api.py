"""The Python API: its examples, its names, what it costs to import, and that it does what the command line does."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import compress
from compress import api, cli
from compress.package import manifest
from compress.report.model import EncoderSpeed
from tiny_models import PLAIN_INT8

Model = Callable[[str], Path]

FUNCTIONS = sorted(name for name in compress.__all__ if name.islower() and not name.startswith("_"))
#: Examples that use what others leave behind run in this order.
EXAMPLES = ("export", "plan", "validate", "bench", "load_report", "inspect", "generate", "prune_model", "sweep")


# ------------------------------------------------------------------------------------------------------------ examples


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_model: Model, skeletons: Any) -> Iterator[Path]:
    """Yield a working directory with the model that the examples name."""
    place = tmp_path_factory.mktemp("desk")
    shutil.copytree(tiny_model("llama"), place / "tiny-llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("compress.graph.skeleton.build_skeleton", skeletons.build)
        # Its skeleton is kept by then: the examples of exports come first.
        patch.setattr("compress.fleet.jobs.LAUNCHER", (str(Path(__file__).parent / "fleet" / "quick_export.py"),))
        patch.setenv("TEST_SKELETONS", str(skeletons._directory))
        yield place


def run_examples(subject: object, name: str) -> tuple[int, str]:
    """Run an object's examples and return how many there are, and what went wrong."""
    heard: list[str] = []
    (found,) = doctest.DocTestFinder(recurse=False).find(subject, name, globs={})
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(found, out=heard.append)
    return len(found.examples), "".join(heard)


@pytest.mark.usefixtures("desk")
def test_every_functions_examples_work() -> None:
    assert set(EXAMPLES) <= set(FUNCTIONS)
    for name in (*EXAMPLES, *(other for other in FUNCTIONS if other not in EXAMPLES)):
        count, wrong = run_examples(getattr(compress, name), name)
        assert count and not wrong, f"{name}: {wrong or 'has no example'}"
    assert run_examples(compress, "compress") == (2, "")


def test_an_example_that_says_something_else_is_seen() -> None:
    def wrong() -> None:
        """
        >>> 1 + 1
        3
        """

    count, heard = run_examples(wrong, "wrong")
    assert count == 1 and "Expected:" in heard


# --------------------------------------------------------------------------------------------------------------- names


def test_importing_every_module_leaves_the_functions_where_they_are() -> None:
    """A module imported as ``compress.plan`` would take the place of the function of that name."""
    program = (
        "import importlib, pkgutil, compress\n"
        "names = [item.name for item in pkgutil.walk_packages(compress.__path__, 'compress.')]\n"
        "assert len(names) > 150, names\n"
        "for name in names:\n"
        "    if name not in ('compress.__main__',) and not name.endswith('_worker') and '.providers._' not in name:\n"
        "        importlib.import_module(name)\n"
        "for name in compress.__all__:\n"
        "    value = getattr(compress, name)\n"
        "    assert name == '__version__' or callable(value), name\n"
        "print('as they were')\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("as they were\n", "")


def test_no_module_has_a_functions_name() -> None:
    modules = {item.name for item in pkgutil.iter_modules(compress.__path__)}
    assert not modules & set(compress.__all__)
    assert {"planning", "validation", "generation", "prune"} <= modules  # the control: modules are seen


def test_names_are_there_and_say_where_they_are_from() -> None:
    assert set(compress.__all__) <= set(dir(compress))
    assert compress.__all__ == sorted(compress.__all__)
    for name in FUNCTIONS:
        assert getattr(compress, name) is getattr(api, name)
    assert issubclass(compress.UsageError, compress.CompressError)
    with pytest.raises(AttributeError, match="no attribute 'exprt'"):
        compress.exprt  # type: ignore[attr-defined]  # noqa: B018
    assert importlib.import_module("compress.prune").__path__  # the package keeps its name


def test_importing_compress_imports_nothing() -> None:
    program = (
        "import sys; before = set(sys.modules); import compress; "
        "print(sorted(name for name in set(sys.modules) - before if not name.startswith('compress')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"pydantic", "numpy", "click", "torch", "importlib.metadata"} & set(
        json.loads(done.stdout.replace("'", '"'))
    )
    program = (
        "import sys, compress; compress.export; print({'torch', 'transformers', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# ------------------------------------------------------------------------------------- the same as on the command line


@pytest.mark.usefixtures("fast_skeletons")
def test_an_export_is_the_command_lines(tiny_model: Model, tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    result = compress.export(tiny_model("bert:embedding"), PLAIN_INT8, tmp_path / "out", validate=False, threads=1)
    expected = manifest.read_manifest(tiny_artifact("bert:embedding", PLAIN_INT8))
    assert result.manifest == expected == manifest.read_manifest(tmp_path / "out")
    assert (result.status, result.passed, result.verdict, result.report, result.exit_code) == (
        "built", False, None, None, 0
    )  # fmt: skip


def test_documents_are_the_command_lines(
    tiny_model: Model, tiny_artifact: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*words: str) -> Any:
        assert cli.run([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    for name, profile in (("phi3", "arm-int4"), ("bert:text-classification", "x86-int8")):
        model = tiny_model(name)
        document = printed("plan", str(model), "--profile", profile, "--threads", "2")
        assert compress.plan(model, profile, threads=2).model_dump(mode="json") == document
    artifact = tiny_artifact("llama")
    assert compress.inspect(artifact) == printed("inspect", str(artifact))
    assert [item["name"] for item in printed("profiles")] == list(compress.profiles())
    assert [item["name"] for item in printed("models")] == list(compress.models())


def test_a_profile_may_be_given_whole(tiny_model: Model) -> None:
    recipe = compress.profiles()["arm-int4"]
    changes = ["quantize.roles.down.bits=8"]
    by_name = compress.plan(tiny_model("llama"), "arm-int4", overrides=changes)
    assert compress.plan(tiny_model("llama"), recipe, overrides=changes) == by_name
    assert compress.plan(tiny_model("llama"), recipe, overrides=changes[0]) == by_name  # not a word a letter
    assert compress.plan(tiny_model("llama"), recipe) != by_name
    with pytest.raises(compress.UsageError, match="unknown key 'quantize.bit'"):
        compress.plan(tiny_model("llama"), recipe, overrides=["quantize.bit=8"])


def test_a_budget_that_was_overridden_chooses_bits_for_a_profile_given_whole_too() -> None:
    from compress.profile import load_profile, override

    changes = ["quantize.effort=balanced", "budget.max_bytes=88MB"]
    recipe = override(compress.profiles()["x86-int4"], changes)
    assert recipe == load_profile("x86-int4", changes)
    assert recipe.quantize.allocation == "budget"


def test_an_encoder_is_timed_by_lengths(tiny_artifact: Callable[..., Path]) -> None:
    artifact = tiny_artifact("distilbert:text-classification", PLAIN_INT8)
    (speed,) = compress.bench(artifact, repeats=1, threads=1)
    assert isinstance(speed, EncoderSpeed) and speed.points


# -------------------------------------------------------------------------------------------------------------- errors


def test_errors_are_the_command_lines(tiny_model: Model, tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(compress.UsageError, match="did you mean arm-int8 or arm-int4"):
        compress.export(model, "arm-int")
    with pytest.raises(compress.UsageError, match="the output exists already"):
        compress.export(model, "arm-int4", model)
    with pytest.raises(compress.UsageError, match="'much' is not a size"):
        compress.export(model, "arm-int4", tmp_path / "out", max_memory="much")
    with pytest.raises(compress.ResourceError, match="--max-memory"):
        compress.export(model, "arm-int4", tmp_path / "out", max_memory=1_000_000)
    with pytest.raises(compress.UsageError, match="0 threads"):
        compress.plan(model, "arm-int4", threads=0)
    with pytest.raises(compress.UsageError, match="1 new tokens"):
        compress.bench(tiny_artifact("llama"), new_tokens=1)
    with pytest.raises(compress.UsageError, match="new_tokens is 0"):
        next(compress.generate(tiny_artifact("llama"), "word", new_tokens=0))
    with pytest.raises(compress.CompressError, match="report cannot be read"):
        compress.load_report(tmp_path)
    with pytest.raises(compress.CompressError, match="it has no manifest.json"):
        compress.inspect(tmp_path)
    assert list(tmp_path.iterdir()) == []
