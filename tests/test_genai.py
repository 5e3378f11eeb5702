"""int4 artifacts load in onnxruntime-genai as they are and say what a plain ONNX Runtime loop says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from plain_decoder import PlainDecoder
from tiny_models import FAMILIES, INT8_CACHE, VOCABULARY

genai = pytest.importorskip("onnxruntime_genai")

PROMPT, NEW = 17, 24
END = 2  # of the tiny models


def generate(artifact: Path, prompt: list[int], count: int) -> list[int]:
    model = genai.Model(str(artifact))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    tokens: list[int] = []
    while len(tokens) < count and not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


def prompt_of(seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, VOCABULARY, PROMPT)]


def telling(decoder: PlainDecoder, count: int = 4) -> list[tuple[list[int], list[int]]]:
    """Return the first prompts whose greedy tokens could tell a difference, each with its tokens.

    They do not end early, each says a token that the others did not, and no
    choice between two logits is a matter of rounding.
    """
    found: list[tuple[list[int], list[int]]] = []
    for seed in range(100):
        tokens, lead = decoder.greedy(prompt_of(seed), NEW)
        said = {token for _, others in found for token in others}
        if END not in tokens and set(tokens) - said and lead > 1e-2:
            found.append((prompt_of(seed), tokens))
        if len(found) == count:
            return found
    raise AssertionError("no prompt makes this model say anything that tells")


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_same_greedy_tokens_as_a_plain_loop(name: str, keep: int, tiny_artifact: Callable[..., Path]) -> None:
    overrides = ("graph.logits_to_keep=1",) if keep else ()
    artifact = tiny_artifact(name, "arm-int4", *overrides)
    cases = telling(PlainDecoder(artifact))
    # A random model likes to repeat itself; together the prompts make it say enough.
    assert len({token for _, tokens in cases for token in tokens}) >= 5
    for prompt, expected in cases:
        assert generate(artifact, prompt, NEW) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_float16_logits_and_cache_are_taken(name: str, tiny_artifact: Callable[..., Path]) -> None:
    artifact = tiny_artifact(name, "cuda-fp16")
    for prompt, expected in telling(PlainDecoder(artifact)):
        assert generate(artifact, prompt, NEW) == expected


@pytest.mark.parametrize("name", ["llama", "llama-untied", "phi3"])
def test_integer_products_of_a_rotated_model_are_taken(name: str, tiny_artifact: Callable[..., Path]) -> None:
    artifact = tiny_artifact(name, "x86-int8-hybrid", "quantize.effort=fast")
    for prompt, expected in telling(PlainDecoder(artifact)):
        assert generate(artifact, prompt, NEW) == expected


@pytest.mark.parametrize("more", [(), ("graph.attention=materialized",)], ids=["tiled", "held"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_of_bytes_is_taken(
    name: str, more: tuple[str, ...], tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    artifact = tiny_artifact(name, "float", *INT8_CACHE, *more)
    cases = telling(PlainDecoder(artifact))
    for prompt, expected in cases:
        assert generate(artifact, prompt, NEW) == expected
    # The control: at other scales the same bytes say something else.
    broken = shutil.copytree(artifact, tmp_path / "broken")
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    for item in model.graph.initializer:
        if item.name.endswith(".value_scale"):
            item.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(item) / 8, item.name))
    (broken / "model.onnx").write_bytes(model.SerializeToString())
    assert any(generate(broken, prompt, NEW) != expected for prompt, expected in cases)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_taken_in_pieces(name: str, keep: int, tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    """Where scores are held whole; the prompts here are shorter than the piece, so another is set."""
    given = ("graph.attention=materialized", f"graph.logits_to_keep={keep}")
    artifact = shutil.copytree(tiny_artifact(name, "arm-int4", *given), tmp_path / "artifact")
    path = artifact / "genai_config.json"
    config = json.loads(path.read_text())
    if name == "phi3-longrope":
        assert "chunk_size" not in config["search"]
        return
    assert config["search"]["chunk_size"] == 256
    cases = telling(PlainDecoder(artifact))
    for piece, runs in ((256, 1), (5, 4)):  # 5: three whole ones and two tokens
        config["search"]["chunk_size"] = piece
        config["model"]["decoder"]["session_options"]["enable_profiling"] = str(tmp_path / f"profile-{piece}")
        path.write_text(json.dumps(config))
        for prompt, expected in cases:
            assert generate(artifact, prompt, NEW) == expected
        events = [event for file in tmp_path.glob(f"profile-{piece}*") for event in json.loads(file.read_text())]
        # A run for every piece, and one for every token but the first.
        assert sum(event["name"] == "model_run" for event in events) == len(cases) * (runs + NEW - 1)


def test_other_graphs_are_given_prompts_whole(tiny_artifact: Callable[..., Path]) -> None:
    config = json.loads((tiny_artifact("llama", "arm-int4") / "genai_config.json").read_text())
    assert "chunk_size" not in config["search"]


def test_another_model_says_something_else(tiny_artifact: Callable[..., Path]) -> None:
    prompt = prompt_of(1)
    tokens = [generate(tiny_artifact(name, "arm-int4"), prompt, NEW) for name in ("llama", "mistral")]
    assert tokens[0] != tokens[1]


def test_an_unknown_key_is_refused_so_only_known_ones_are_written(
    tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    artifact = shutil.copytree(tiny_artifact("llama", "arm-int4"), tmp_path / "artifact")
    path = artifact / "genai_config.json"
    genai.Model(str(artifact))
    config = json.loads(path.read_text())
    config["model"]["decoder"]["surprise"] = 1
    path.write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="surprise"):
        genai.Model(str(artifact))


def test_search_defaults_are_the_generation_configs(tiny_artifact: Callable[..., Path]) -> None:
    artifact = tiny_artifact("gpt2", "arm-int4")
    config = json.loads((artifact / "genai_config.json").read_text())
    assert config["model"]["type"] == "decoder"
    assert config["model"]["eos_token_id"] == END
    assert config["model"]["bos_token_id"] == 1
    assert config["model"]["context_length"] == config["search"]["max_length"] == 256
    assert config["search"]["do_sample"] is False
