"""What the worker sees on calibration texts, against a plain run of transformers' own model; and the texts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import calibrated, encoder_of, in_process, plant, texts_of, torch_model

from compress import pipeline
from compress.calibrate import encoder as calibrate_encoder
from compress.calibrate.encoder import Calibrated, moments
from compress.calibrate.encoder_texts import LONGEST, RANDOM, TEXTS
from compress.errors import CompressError, UsageError
from compress.planning import make_plan
from compress.profile import load_profile
from compress.source import open_checkpoint
from compress.validation import text
from compress.validation.encoded import Encoded
from tiny_models import POSITIONS, VOCABULARY

NAMES = ("bert:embedding", "albert:question-answering", "electra:text-classification")


def request(model: Path, texts: Encoded, work: Path, **changes: Any) -> dict[str, Any]:
    """Return what :func:`compress.calibrate.encoder.calibrate` asks the worker for."""
    encoder = encoder_of(model)
    texts.save(work / "texts.npz")
    return {
        "checkpoint": {"reference": str(model)},
        "texts": str(work / "texts.npz"),
        "output": str(work / "statistics.npz"),
        "linears": {item.name: list(item.graph_weights) for item in encoder.linears if item.layer is not None},
        "smoothing": False,
        "bits": {},
        "measure_losses": False,
        "static": [],
        "range": "percentile",
        "memory_cap": None,
        **changes,
    }


def pieces(texts: Encoded) -> list[list[int]]:
    return [
        texts.ids[start : start + length].tolist() for start, length in zip(texts.starts, texts.lengths, strict=True)
    ]


# -------------------------------------------------------------------------------------------------------- statistics


def direct(model: Path, texts: Encoded) -> dict[str, np.ndarray]:
    """Return every linear's inputs ``[tokens, K]`` by parameter name, one text at a time."""
    import torch

    network, seen = torch_model(model), {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, given, name=name: seen.setdefault(f"{name}.weight", []).append(given[0].flatten(0, -2))
            )
    for start, length in zip(texts.starts, texts.lengths, strict=True):
        ids, types = (
            torch.from_numpy(array[start : start + length])[None].clone() for array in (texts.ids, texts.types)
        )
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            network(**given, **({} if network.config.model_type == "distilbert" else {"token_type_ids": types}))
    return {name: torch.cat(parts).numpy().astype(np.float64) for name, parts in seen.items()}


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_a_plain_run(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = plant(tiny_model(name), tmp_path / "model")
    texts, encoder = texts_of(model), encoder_of(model)
    answer = in_process("calibrate.encoder_worker", request(model, texts, tmp_path))
    assert answer["results"] == [{"texts": len(texts), "losses": {}}]
    seen, weights = direct(model, texts), dict(torch_model(model).named_parameters())
    with np.load(tmp_path / "statistics.npz") as stored:
        found = dict(stored)
    blocks = [linear for linear in encoder.linears if linear.layer is not None]
    assert {key.rpartition("/")[0] for key in found} == {linear.name for linear in blocks}
    for linear in blocks:
        inputs = seen[linear.graph_weights[0]]
        size = np.abs(inputs).max()
        for measure, expected, unit in (
            ("low", inputs.min(axis=0), size),
            ("high", inputs.max(axis=0), size),
            ("mean", inputs.mean(axis=0), size),
            ("moments", inputs.T @ inputs / len(inputs), size**2),
        ):
            array = found[f"{linear.name}/{measure}"]
            assert array.dtype == np.float32 and array.shape == expected.shape
            assert np.abs(array - expected).max() < 1e-5 * unit, (linear.name, measure)
        second = found[f"{linear.name}/moments"]
        assert np.array_equal(second, second.T) and np.linalg.eigvalsh(second.astype(np.float64)).min() > -1e-4 * size
        # Negative control: one text fewer, and the wrong linear's.
        fewer = inputs[int(texts.lengths[0]) :]
        assert np.abs(found[f"{linear.name}/mean"] - fewer.mean(axis=0)).max() > 1e-5 * size
        peak = np.max([np.abs(weights[part].detach().numpy()).max(axis=0) for part in linear.graph_weights], axis=0)
        assert np.array_equal(found[f"{linear.name}/peak"], peak)
        assert len(inputs) == len(texts.ids) * (encoder.layers if name.startswith("albert") else 1)


def found_on(model: Path, work: Path, *overrides: str, **changes: Any) -> Calibrated:
    profile = load_profile("x86-int8", overrides)
    with open_checkpoint(str(model)) as checkpoint:
        plan = make_plan(pipeline.describe(checkpoint), profile, checkpoint)
        return calibrated(checkpoint, plan, profile, work, **changes)


def test_moments_follow_the_smoothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Those of the inputs that the stored weight meets: shifted, scaled, repeated."""
    model = plant(tiny_model("bert:embedding"), tmp_path / "model")
    found = found_on(model, tmp_path)
    seen = direct(model, texts_of(model))
    shapes = set()
    for linear in encoder_of(model).linears:
        change = found.smoothing.linears.get(linear.name)
        inputs = seen[linear.graph_weights[0]]
        changed = inputs if change is None else change.inputs(inputs)
        second = moments(found, linear.name)
        assert second is not None
        expected = changed.T @ changed / len(changed)
        assert np.abs(second - expected).max() < 1e-4 * np.abs(expected).max(), linear.name
        shapes.add(second.shape[0] - linear.in_features)
        if change is not None and change.column_scale is not None and change.shift is not None:
            plain = inputs.T @ inputs / len(inputs)
            assert np.abs(second - plain).max() > np.abs(expected).max(), "the source's are others"
    assert shapes > {0}, "some were repeated"
    assert moments(found, "no.such.linear") is None


# ------------------------------------------------------------------------------------------------------------- words


def test_states_that_are_not_finite_are_words(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_model("bert:embedding"), model)
    weights = dict(load_file(model / "model.safetensors"))
    weights["embeddings.LayerNorm.weight"] = np.full(64, 3e38, np.float32)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match="hidden states are not finite") as caught:
        in_process("calibrate.encoder_worker", request(model, texts_of(model), tmp_path))
    assert caught.value.where is not None and "encoder.layer.0" in caught.value.where
    assert not (tmp_path / "statistics.npz").exists()


def test_a_linear_that_is_not_there_is_words(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("bert:embedding")
    wrong = request(model, texts_of(model), tmp_path, linears={"x": ["encoder.layer.0.output.dens.weight"]})
    with pytest.raises(CompressError, match="lacks a linear layer") as caught:
        in_process("calibrate.encoder_worker", wrong)
    assert caught.value.where == "encoder.layer.0.output.dens.weight"


def test_a_model_beyond_the_memory_cap_is_words(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="memory"):
        found_on(tiny_model("bert:embedding"), tmp_path, memory_cap=1000)
    assert list(tmp_path.iterdir()) == [], "no texts are left"


def test_nothing_is_left_of_a_worker_that_fails(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any, **__: Any) -> None:
        assert [path.name for path in tmp_path.iterdir()] == [".calibration-texts.npz"]
        raise CompressError("crashed")

    profile = load_profile("x86-int8")
    monkeypatch.setattr(calibrate_encoder, "run_worker", crash)
    with open_checkpoint(str(tiny_model("bert:embedding"))) as checkpoint:
        plan = make_plan(pipeline.describe(checkpoint), profile, checkpoint)
        with pytest.raises(CompressError, match="crashed"):
            calibrate_encoder.calibrate(
                plan,
                checkpoint,
                profile,
                source={},
                content=text.embedded("calibration"),
                work=tmp_path,
                seed=0,
                memory_cap=None,
                progress=lambda fraction: None,
            )
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- the texts


def test_texts_are_framed_and_fit(tiny_model: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    model = tiny_model("bert:embedding")
    tokenizer, texts = AutoTokenizer.from_pretrained(model), texts_of(model)
    assert len(texts) == TEXTS + RANDOM
    assert texts.lengths.max() <= min(POSITIONS, LONGEST) and texts.ids.max() < VOCABULARY
    for ids in pieces(texts):
        assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id and len(ids) > 2
    assert len({len(ids) for ids in pieces(texts)}) > 10, "many lengths"
    random = {token for ids in pieces(texts)[TEXTS:] for token in ids}
    written = {token for ids in pieces(texts)[:TEXTS] for token in ids}
    assert len(random) > 0.95 * VOCABULARY and random - written, "what no text has"


def test_texts_depend_on_seed_and_content_alone(tiny_model: Callable[[str], Path]) -> None:
    model = tiny_model("bert:embedding")
    first, again, other = texts_of(model), texts_of(model), texts_of(model, seed=1)
    assert pieces(first) == pieces(again)
    assert pieces(first)[:TEXTS] == pieces(other)[:TEXTS] and pieces(first)[TEXTS:] != pieces(other)[TEXTS:]
    own = texts_of(model, "\n\n".join(f"The answer number {number} is not known yet." for number in range(5)))
    assert len(own) == 5 + RANDOM and pieces(own)[0] not in pieces(first)


def test_too_short_a_text_is_words(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="no sentence of three words") as caught:
        texts_of(tiny_model("bert:embedding"), "Two words.\n\nOr one.")
    assert caught.value.where == "own" and "longer" in (caught.value.hint or "")
