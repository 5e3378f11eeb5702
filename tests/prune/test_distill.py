"""Distillation: a student comes nearer to its original, reproducibly, and never ends worse than it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from students import WEIGHTS, in_process, make_student, run, some_texts, some_windows

from compress.errors import CompressError, ResourceError, UsageError
from compress.pipeline import describe
from compress.prune import student as learning
from compress.prune.distill_texts import TEXTS, TOKENS, WINDOW, learning_texts
from compress.source import open_checkpoint
from compress.source.sentence_transformers import Pooling
from compress.validation import text
from compress.validation.protocol import run_worker
from tiny_models import POSITIONS, save_tiny_model

Get = Callable[[str], Path]
DECODERS = ("llama", "phi3", "gpt2")
ENCODERS = (
    "bert:embedding",
    "distilbert:text-classification",
    "albert:question-answering",
    "electra:token-classification",
    "bert:fill-mask",
)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker spends seconds on its imports."""
    monkeypatch.setattr("compress.prune.distill.run_worker", in_process)


def texts_for(name: str) -> Any:
    return some_texts() if ":" in name else some_windows()


def plain(directory: Path, name: str) -> Any:
    """Return transformers' own model of a directory."""
    import transformers

    kind = transformers.AutoModel if ":" in name else transformers.AutoModelForCausalLM
    return kind.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_a_student_comes_nearer(name: str, tiny_model: Get, tmp_path: Path) -> None:
    student = make_student(tiny_model(name), tmp_path / "student", noise=0.06)
    untouched = (student / WEIGHTS).read_bytes()
    seen: list[float] = []
    found = run(tiny_model(name), student, texts_for(name), tmp_path / "out.safetensors", progress=seen.append)
    assert found.improved and found.after < 0.85 * found.before, found.history
    assert found.after == min(loss for _, loss in found.history) and found.history[0] == (0, found.before)
    assert found.steps == found.history[-1][0] <= 30 and found.seconds > 0 and seen[-1] == 1.0
    assert (student / WEIGHTS).read_bytes() == untouched, "the student's own files stay"
    old, new = load_file(student / WEIGHTS), load_file(tmp_path / "out.safetensors")
    assert {key: item.shape for key, item in new.items()} == {key: item.shape for key, item in old.items()}
    assert all(item.dtype == torch.float32 for item in new.values())
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    tables = {key for key in old if any(part in key for part in ("embeddings.weight", "wte", "wpe", "embed_tokens"))}
    assert tables and not changed & tables and "lm_head.weight" not in changed
    assert len(changed) >= 0.7 * len(old.keys() - tables), "nearly all else learnt"


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "phi3-longrope"])
def test_the_loss_is_the_divergence_of_plain_models(name: str, tiny_model: Get, tmp_path: Path) -> None:
    """What is called loss, computed again from transformers' own logits; and none of a model beside itself."""
    student, windows = make_student(tiny_model(name), tmp_path / "student"), some_windows(16, 40)
    found = run(tiny_model(name), student, windows, tmp_path / "out", steps=1)
    held = torch.from_numpy(windows[learning.split(np.full(16, 40), 0).held_out])
    with torch.no_grad():
        q, p = (
            torch.log_softmax(plain(place, name)(held).logits.double(), -1) for place in (tiny_model(name), student)
        )
    expected = float((q.exp() * (q - p)).sum(-1).mean())
    assert found.before == pytest.approx(expected, rel=1e-4)
    again = run(tiny_model(name), tiny_model(name), windows, tmp_path / "same", steps=1)
    assert abs(again.before) < 1e-5 < 1e-3 < found.before


@pytest.mark.parametrize(("mode", "normalize"), [("mean", True), ("cls", False), ("max", True)])
def test_an_embeddings_loss(mode: Any, normalize: bool, tiny_model: Get, tmp_path: Path) -> None:
    name, texts = "bert:embedding", some_texts()
    student = make_student(tiny_model(name), tmp_path / "student")
    pooling = Pooling(mode, normalize, None, False)
    found = run(tiny_model(name), student, texts, tmp_path / "out", steps=1, pooling=pooling)
    models = [plain(place, name) for place in (tiny_model(name), student)]
    states = []
    for start, length in zip(texts.starts, texts.lengths, strict=True):
        ids = torch.from_numpy(texts.ids[start : start + length])[None]
        with torch.no_grad():
            states.append([model(input_ids=ids).last_hidden_state[0].double() for model in models])
    power = float(torch.cat([taught for taught, _ in states]).square().sum(1).mean())
    expected = []
    for index in learning.split(texts.lengths, 0).held_out:
        taught, own = states[index]
        pool = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "max": lambda x: x.amax(0)}[mode]
        a, b = pool(taught), pool(own)
        vectors = 1 - torch.dot(a, b) / a.norm() / b.norm() if normalize else (a - b).square().sum() / power
        expected.append(float((taught - own).square().sum(1).mean() / power + vectors))
    assert found.before == pytest.approx(np.mean(expected), rel=1e-4)
    same = run(tiny_model(name), tiny_model(name), texts, tmp_path / "same", steps=1, pooling=pooling)
    assert abs(same.before) < 1e-5


@pytest.mark.parametrize("name", ["llama", "distilbert:text-classification"])
def test_bytes_depend_on_the_seed_and_not_on_threads(name: str, tiny_model: Get, tmp_path: Path) -> None:
    student, texts = make_student(tiny_model(name), tmp_path / "student", noise=0.06), texts_for(name)
    results = {}
    for label, changes in {"one": {}, "again": {}, "two": {"threads": 2}, "seed": {"seed": 1}}.items():
        run(tiny_model(name), student, texts, tmp_path / label, steps=8, **changes)
        results[label] = (tmp_path / label).read_bytes()
    assert results["one"] == results["again"] == results["two"] != results["seed"]


def test_the_worker_gives_the_same_bytes_in_the_memory_predicted(
    tiny_model: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, windows = make_student(tiny_model("gpt2"), tmp_path / "student"), some_windows()
    run(tiny_model("gpt2"), student, windows, tmp_path / "here", steps=5)
    monkeypatch.setattr("compress.prune.distill.run_worker", run_worker)
    found = run(tiny_model("gpt2"), student, windows, tmp_path / "worker", steps=5, threads=2)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "worker").read_bytes()
    assert 0.75 < found.peak_rss_bytes / found.predicted_bytes < 1.25


def test_zeros_stay_zeros(tiny_model: Get, tmp_path: Path) -> None:
    """A head that was removed by zeroing stays removed; without the key it grows back."""
    student = make_student(tiny_model("llama"), tmp_path / "student")
    weights, name = load_file(student / WEIGHTS), "model.layers.1.self_attn.o_proj.weight"
    weights[name][:, 16:32] = 0.0
    save_file(weights, student / WEIGHTS, metadata={"format": "pt"})
    for label, frozen in {"frozen": (name,), "free": ()}.items():
        run(tiny_model("llama"), student, some_windows(), tmp_path / label, steps=8, frozen_zeros=frozen)
        new = load_file(tmp_path / label)[name]
        assert bool((new[:, 16:32] == 0).all()) == (label == "frozen")
        assert not torch.equal(new[:, :16], weights[name][:, :16])
    with pytest.raises(UsageError, match=r"no tensor 'x\.y'"):
        run(tiny_model("llama"), student, some_windows(), tmp_path / "x", frozen_zeros=("x.y",))


def test_an_interrupted_run_ends_with_the_same_bytes(
    tiny_model: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, windows, state = make_student(tiny_model("gpt2"), tmp_path / "student"), some_windows(), tmp_path / "state"
    whole = run(tiny_model("gpt2"), student, windows, tmp_path / "whole")
    step, taken = learning.Student._step, []

    def dies(self: Any, number: int) -> None:
        if number == 13:
            raise KeyboardInterrupt
        taken.append(number)
        step(self, number)

    monkeypatch.setattr(learning.Student, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model("gpt2"), student, windows, tmp_path / "resumed", state=state)
    assert state.exists() and not (tmp_path / "resumed").exists()

    def goes_on(self: Any, number: int) -> None:
        taken.append(number)
        step(self, number)

    monkeypatch.setattr(learning.Student, "_step", goes_on)
    for changes in ({"seed": 1}, {"rate": 1e-3}):
        with pytest.raises(UsageError, match="of another distillation"):
            run(tiny_model("gpt2"), student, windows, tmp_path / "resumed", state=state, **changes)
    with pytest.raises(UsageError, match="of another distillation"):
        run(tiny_model("gpt2"), student, windows[::-1], tmp_path / "resumed", state=state)
    taken.clear()
    resumed = run(tiny_model("gpt2"), student, windows, tmp_path / "resumed", state=state, threads=2)
    assert taken[0] == 11, "it went on from the last evaluation"
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert resumed.history == whole.history and not state.exists()
    state.write_bytes(b"\x08")
    with pytest.raises(UsageError, match="damaged"):
        run(tiny_model("gpt2"), student, windows, tmp_path / "resumed", state=state)


def test_what_gets_worse_is_not_written(tiny_model: Get, tmp_path: Path) -> None:
    """Steps far too long: the best weights are those it began with."""
    student = make_student(tiny_model("llama"), tmp_path / "student", noise=0.0, layers=3)
    found = run(tiny_model("llama"), student, some_windows(), tmp_path / "out", rate=1.0)
    assert not found.improved and found.after == found.before and found.history[-1][1] > found.before
    assert found.stopped == "plateau" and found.steps < 30
    assert not (tmp_path / "out").exists()


def test_the_best_weights_are_those_that_are_written(
    tiny_model: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, windows = make_student(tiny_model("llama"), tmp_path / "student"), some_windows()
    evaluations = learning.Student.held_out_loss
    kept: list[dict[str, torch.Tensor]] = []

    def better_then_worse(self: Any) -> float:
        evaluations(self)
        kept.append({name: weight.clone() for name, weight in self.adam.weights.items()})
        return [3.0, 2.0, 1.0, 4.0][len(kept) - 1] if len(kept) < 5 else 5.0

    monkeypatch.setattr(learning.Student, "held_out_loss", better_then_worse)
    found = run(tiny_model("llama"), student, windows, tmp_path / "out")
    new = load_file(tmp_path / "out")
    assert found.after == 1.0 and all(torch.equal(new[name], weight) for name, weight in kept[2].items())
    assert not all(torch.equal(new[name], weight) for name, weight in kept[3].items())


def test_a_loss_that_is_not_finite_is_words(tiny_model: Get, tmp_path: Path) -> None:
    student = make_student(tiny_model("llama"), tmp_path / "student")
    weights = load_file(student / WEIGHTS)
    weights["model.norm.weight"][:] = 3e38
    save_file(weights, student / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CompressError, match="student's loss is not finite"):
        run(tiny_model("llama"), student, some_windows(), tmp_path / "out", state=tmp_path / "state")
    with pytest.raises(CompressError, match="original's outputs are not finite"):
        run(student, tiny_model("llama"), some_windows(), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]


def test_bad_input_is_words(tiny_model: Get, tmp_path: Path) -> None:
    model, windows = tiny_model("llama"), some_windows()
    with pytest.raises(UsageError, match="gives 15 windows, distillation needs at least 16"):
        run(model, model, windows[:15], tmp_path / "out")
    with pytest.raises(UsageError, match="gives 3 texts"):
        run(model, model, some_texts(3), tmp_path / "out")
    with pytest.raises(UsageError, match="0 steps"):
        run(model, model, windows, tmp_path / "out", steps=0)
    with pytest.raises(ResourceError, match="distillation.*allowed"):
        run(model, model, windows, tmp_path / "out", memory_cap=1_000_000)
    name = "distilbert:text-classification"
    two = save_tiny_model(name, tmp_path / "two", num_labels=2)
    with pytest.raises(UsageError, match="student has 3 labels, the teacher 2"):
        run(two, tiny_model(name), some_texts(), tmp_path / "out")
    with pytest.raises(UsageError, match="student's task is embedding, the teacher's text-classification"):
        run(two, tiny_model("bert:embedding"), some_texts(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gpt2", "bert:embedding", "bert:fill-mask", "albert:question-answering"])
def test_texts_are_as_the_task_takes_them(name: str, tiny_model: Get) -> None:
    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        texts = learning_texts(describe(checkpoint), checkpoint, text.embedded("calibration"))
    if isinstance(texts, np.ndarray):
        assert texts.shape[1] == WINDOW and 100 < len(texts) <= TOKENS // WINDOW
        return
    assert 100 < len(texts) <= TEXTS and texts.lengths.max() <= POSITIONS
    assert bool(texts.types.any()) == name.endswith("answering")
    assert texts.keep.any() and (texts.rows("fill-mask") <= 1024 or not name.endswith("mask"))
