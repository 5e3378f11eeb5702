"""A decoder's static graphs compute what transformers does: prefill in pieces, then token by token over the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from compress import pipeline
from compress.errors import CompressError, UsageError
from compress.profile import load_profile
from compress.progress import Stages
from compress.validation.static_decoding import DECODE_NAME, StaticDecoder
from static_sessions import open_static, source_logits
from tiny_models import VOCABULARY, save_tiny_model

NEW, SLOTS = 16, 48
SHORT = ("validation.tokens=32", "validation.window=32", "validation.prompt_tokens=16", "validation.new_tokens=16")
STATIC = ('graph.fusions=["gelu"]', f"graph.static_length={NEW}", f"graph.cache_length={SLOTS}", "targets=[]", *SHORT)
#: Longer than one prefill, and not a multiple of it; then so many single tokens.
PROMPT, STEPS = 37, 5
#: Observed: 3e-6.
TOLERANCE = 3e-5
FAMILIES = ("llama", "llama-untied")

Artifact = Callable[..., Path]
Model = Callable[[str], Path]


def tokens(count: int = PROMPT + STEPS) -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCABULARY, (1, count))


def by_pieces(decoder: StaticDecoder, ids: np.ndarray) -> np.ndarray:
    decoder.reset()
    prefill = [decoder.feed(ids[:, :PROMPT])]
    return np.concatenate([*prefill, *(decoder.feed(ids[:, at : at + 1]) for at in range(PROMPT, ids.shape[1]))], 1)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str, tiny_artifact: Artifact, tiny_model: Model) -> None:
    """Three prefills, the last one padded, and five tokens one by one: the same as one long run of the source."""
    ids = tokens()
    found, wanted = (
        by_pieces(open_static(tiny_artifact(name, "float", *STATIC)), ids),
        source_logits(tiny_model(name), ids),
    )
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < TOLERANCE


@pytest.mark.parametrize("name", ["mistral", "phi3"])
def test_a_window_as_long_as_the_cache_is_none(name: str, fast_skeletons: None, tmp_path: Path) -> None:
    source = save_tiny_model(name, tmp_path / "source", sliding_window=SLOTS)
    output = tmp_path / "artifact"
    options = pipeline.ExportOptions(validate=False, threads=1)
    pipeline.export(pipeline.ModelReference(str(source)), load_profile("float", STATIC), output, options, Stages())
    ids = tokens()
    assert np.abs(by_pieces(open_static(output), ids) - source_logits(source, ids)).max() < TOLERANCE


@pytest.mark.parametrize("fault", ["position", "mask", "cache"])
def test_a_wrong_caller_is_seen(fault: str, tiny_artifact: Artifact, tiny_model: Model) -> None:
    """Negative control: a position off by one, a masked token, a cache written one slot too early."""
    decoder = open_static(tiny_artifact("llama", "float", *STATIC))
    run = decoder._sessions[1].run

    class Faulty:
        def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            changed = {key: array.copy() for key, array in feeds.items()}
            if fault == "position":
                changed["position_ids"] += 1
            elif fault == "mask":
                changed["attention_mask"][:, 5] = 0
            else:
                changed = {key: np.roll(array, -1, 2) if "past" in key else array for key, array in changed.items()}
            return run(names, changed)  # type: ignore[no-any-return]

    decoder._sessions = (decoder._sessions[0], Faulty())
    ids = tokens()
    error = np.abs(by_pieces(decoder, ids) - source_logits(tiny_model("llama"), ids)).max(-1)
    assert error[:PROMPT].max() < TOLERANCE
    assert error[PROMPT:].min() > 100 * TOLERANCE


def test_slots_that_are_not_in_use_do_not_matter(tiny_artifact: Artifact) -> None:
    decoder = open_static(tiny_artifact("llama", "float", *STATIC))
    ids = tokens(20)
    wanted = decoder.feed(ids)
    decoder.reset()
    for array in decoder._cache.values():
        array[:] = 3.0
    assert np.abs(decoder.feed(ids) - wanted).max() < TOLERANCE


def test_every_shape_is_a_number_and_all_operators_are_standard(tiny_artifact: Artifact) -> None:
    artifact = tiny_artifact("llama", "float", *STATIC)
    for name, new in (("model.onnx", NEW), (DECODE_NAME, 1)):
        model = ir.load(artifact / name)
        assert set(model.opset_imports) == {""}
        shapes = {value.name: value.shape for value in [*model.graph.inputs, *model.graph.outputs]}
        assert all(shape is not None and shape.is_static() for shape in shapes.values())
        assert shapes["input_ids"] == ir.Shape([1, new])
        assert shapes["attention_mask"] == ir.Shape([1, SLOTS + new])
        assert shapes["past_key_values.0.key"] == ir.Shape([1, 2, SLOTS, 16])
        assert shapes["present.0.key"] == ir.Shape([1, 2, new, 16])
        assert shapes["logits"] == ir.Shape([1, new, VOCABULARY])


def test_both_graphs_read_one_weights_file(tiny_artifact: Artifact) -> None:
    artifact = tiny_artifact("llama", "float", *STATIC)
    places = []
    for name in ("model.onnx", DECODE_NAME):
        stored = [value.const_value for value in ir.load(artifact / name).graph.initializers.values()]
        external = [tensor for tensor in stored if isinstance(tensor, ir.ExternalTensor)]
        assert {tensor.location for tensor in external} == {"model.onnx.data"}
        places.append({(tensor.name, tensor.offset, tensor.length) for tensor in external})
    assert places[0] == places[1] != set()
    listed = {file["name"] for file in json.loads((artifact / "manifest.json").read_text())["files"]}
    assert {"model.onnx", DECODE_NAME, "model.onnx.data"} <= listed
    assert not list(artifact.glob(".*"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt2", "another position embedding"),
        ("mistral", "a sliding window of 12 tokens, shorter than 48"),
        ("phi3-longrope", "no static form"),
    ],
)
def test_attention_without_a_static_form_is_refused(name: str, reason: str, tiny_artifact: Artifact) -> None:
    with pytest.raises(UsageError, match=reason):
        tiny_artifact(name, "float", *STATIC)


def test_weights_in_fused_operators_are_refused(tiny_artifact: Artifact) -> None:
    with pytest.raises(UsageError, match="not standard|one float32 scale a row"):
        tiny_artifact("llama", "arm-int4", *STATIC)


def test_the_cache_ends(tiny_artifact: Artifact) -> None:
    decoder = open_static(tiny_artifact("llama", "float", *STATIC))
    decoder.feed(tokens(SLOTS))
    with pytest.raises(CompressError, match=f"one sequence of {SLOTS} tokens; 1 of {SLOTS + 1}"):
        decoder.feed(tokens(1))
    decoder.reset()
    with pytest.raises(CompressError, match="one sequence"):
        decoder.feed(np.concatenate([tokens(4)] * 2))


def test_two_prefill_graphs_are_no_decoder(tiny_artifact: Artifact) -> None:
    prefill, _ = open_static(tiny_artifact("llama", "float", *STATIC))._sessions
    with pytest.raises(CompressError, match="decode takes more than one token"):
        StaticDecoder(prefill, prefill)
