"""What source and artifact write: against transformers' own generation, through the workers and by themselves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from compress import validation
from compress.errors import UsageError
from compress.profile import parse_profile
from compress.source import open_checkpoint
from compress.validation import source_samples, worker
from compress.validation.artifact import open_artifact
from compress.validation.samples import PROMPTS, Sampling
from compress.validation.speed import SpeedPlan
from compress.validation.static_decoding import StaticDecoder

NEW = 12
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"


def silent(fraction: float) -> None:
    """Take progress for granted."""


def asked(artifact: Path, new: int = NEW, stop: list[int] | None = None) -> tuple[Sampling, dict[str, Any]]:
    """Let an artifact write; return the samples so far and the source's job."""
    sampling = Sampling(open_artifact(artifact), new)
    (job,) = sampling.prompt_jobs()
    answer = source_samples.encode(None, job, silent)  # type: ignore[arg-type]
    sampling.take_prompts([answer if stop is None else {**answer, "stop": stop}])
    (job,) = sampling.artifact_jobs()
    request = {"model": str(artifact / "model.onnx"), "provider": "cpu", "threads": 1, "jobs": [job]}
    sampling.take_written(worker.handle(request, artifact.parent)["results"])
    assert sampling.artifact_jobs() == [], "the next provider need not write again"
    found = sampling.source_job()
    assert found is not None
    return sampling, found


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    """Return what transformers' own greedy search writes."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in out[0, len(prompt) :]]


def whole_model(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def first_difference(left: list[int], right: list[int]) -> int | None:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), None)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_both_ways_find_what_transformers_writes(
    name: str, tiny_model: Callable[[str], Path], tiny_artifact: Callable[..., Path]
) -> None:
    artifact = tiny_artifact(name, "arm-int4", "quantize.bits=2", "quantize.roles.embedding.block_size=64")
    _, job = asked(artifact, stop=[])
    model = whole_model(tiny_model(name))
    texts = [generated(model, prompt, NEW) for prompt in job["prompts"]]
    expected = [first_difference(own, text) for own, text in zip(job["written"], texts, strict=True)]
    assert len(texts) == 4 and any(first is not None for first in expected), "2 bits change no text"

    complete = source_samples.whole(model, job)["samples"]
    tokenizer = source_samples.prompts.tokenizer_of(artifact)
    decoded = [tokenizer.decode(text, skip_special_tokens=True) for text in texts]
    assert [sample["source"] for sample in complete] == decoded
    assert [sample["first_difference"] for sample in complete] == expected
    assert all(sample["source_complete"] for sample in complete)

    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        ahead = source_samples.ahead(checkpoint, job, silent)["samples"]
    assert [sample["first_difference"] for sample in ahead] == expected
    for sample, text, first in zip(ahead, texts, expected, strict=True):
        known = text if first is None else text[: first + 1]
        assert sample["source"] == tokenizer.decode(known, skip_special_tokens=True)
        assert sample["source_complete"] == (first is None)
    assert [sample["artifact"] for sample in ahead] == [sample["artifact"] for sample in complete]


@pytest.mark.parametrize("place", [0, 5, NEW - 1])
def test_one_planted_token_is_found_where_it_is(
    place: int, tiny_model: Callable[[str], Path], tiny_artifact: Callable[..., Path]
) -> None:
    _, job = asked(tiny_artifact("llama", "float"), stop=[])
    model = whole_model(tiny_model("llama"))
    job["written"] = [generated(model, prompt, NEW) for prompt in job["prompts"]]
    with open_checkpoint(str(tiny_model("llama"))) as checkpoint:
        for answer in (source_samples.ahead(checkpoint, job, silent), source_samples.whole(model, job)):
            assert {sample["first_difference"] for sample in answer["samples"]} == {None}
        job["written"][2][place] = (job["written"][2][place] + 1) % 384
        for answer in (source_samples.ahead(checkpoint, job, silent), source_samples.whole(model, job)):
            assert [sample["first_difference"] for sample in answer["samples"]] == [None, None, place, None]


def test_an_end_token_ends_a_text_on_both_sides(
    tiny_model: Callable[[str], Path], tiny_artifact: Callable[..., Path]
) -> None:
    artifact = tiny_artifact("llama", "float")
    _, free = asked(artifact, stop=[])
    end = free["written"][0][3]
    _, job = asked(artifact, stop=[end])
    for own, other in zip(job["written"], free["written"], strict=True):
        assert own == (other[: other.index(end) + 1] if end in other else other)
    assert len(job["written"][0]) <= 4
    model = whole_model(tiny_model("llama"))
    same = source_samples.whole(model, job)["samples"]
    assert [sample["first_difference"] for sample in same] == [None] * 4
    assert all(sample["source"] == sample["artifact"] for sample in same)
    # The artifact missed the end: the source's text ends there nevertheless.
    place = len(job["written"][0]) - 1
    job["written"][0][place:] = [(end + 1) % 384] * 3
    sample = source_samples.whole(model, job)["samples"][0]
    assert sample["first_difference"] == place
    assert sample["source"] == same[0]["source"] and sample["source_complete"]


def test_prompts_without_room_are_left_out(tiny_artifact: Callable[..., Path]) -> None:
    artifact = open_artifact(tiny_artifact("llama"))
    sampling = Sampling(artifact, 32)
    answer = {"ids": [[1] * 250, [1] * 256, [5000], []], "chat": False, "stop": [2], "reason": None}
    sampling.take_prompts([answer])
    (job,) = sampling.artifact_jobs()
    assert job["limits"] == [6] and job["prompts"] == [[1] * 250] and job["stop"] == [2]
    sampling.take_written([{"tokens": [[]], "limits": [0]}])
    assert sampling.source_job() is None and sampling.reason == "no prompt fits the graph's cache"
    nothing = Sampling(artifact, 0)
    assert nothing.prompt_jobs() == nothing.artifact_jobs() == [] and nothing.source_job() is None


class Slots(StaticDecoder):
    """A static decoder of ten slots that counts."""

    def __init__(self) -> None:
        self.slots, self.length = 10, 0

    def reset(self) -> None:
        self.length = 0

    def feed(self, ids: npt.NDArray[np.int64], keep: int = 0) -> npt.NDArray[np.float32]:
        self.length += ids.shape[1]
        assert self.length <= self.slots
        logits = np.zeros((1, ids.shape[1], 20), np.float32)
        logits[0, -1, (ids[0, -1] + 1) % 20] = 1
        return logits


def test_a_static_graphs_cache_is_not_overrun() -> None:
    item = {"prompts": [[1, 2], [3] * 9, [4] * 10], "limits": [5, 5, 5], "stop": [5]}
    found = worker._samples(Slots(), item, silent)
    assert found == {"tokens": [[3, 4, 5], [4], []], "limits": [5, 1, 0]}


def test_the_chat_template_is_applied_and_a_bad_one_is_a_reason(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "chat")
    job = {"directory": str(directory), "texts": list(PROMPTS)}
    plain = source_samples.encode(None, job, silent)  # type: ignore[arg-type]
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    chat = source_samples.encode(None, job, silent)  # type: ignore[arg-type]
    assert not plain["chat"] and chat["chat"] and plain["ids"] != chat["ids"]
    tokenizer = source_samples.prompts.tokenizer_of(directory)
    assert tokenizer.decode(chat["ids"][0]) == f"[user] {PROMPTS[0]}\n[assistant]"
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    bad = source_samples.encode(None, job, silent)  # type: ignore[arg-type]
    assert bad["ids"] == [] and bad["reason"] == "the prompts cannot be encoded: no users here"


@pytest.mark.parametrize("cap", [None, 1000])
def test_samples_come_with_the_validation(
    cap: int | None, tiny_model: Callable[[str], Path], tiny_artifact: Callable[..., Path]
) -> None:
    """With the source in memory its texts are whole; over the memory cap it only reads the artifact's."""
    result = validation.run_validation(
        tiny_artifact("llama"),
        checkpoint_spec=validation.CheckpointSpec(str(tiny_model("llama"))),
        budgets={},
        tokens=32,
        window=32,
        memory_cap=cap,
        speed_plan=SpeedPlan(prompt_tokens=4, new_tokens=2, repeats=1, timeout=120),
        sample_tokens=NEW,
    )
    assert result.verdict.status == "pass" and result.providers[0].not_measured == {}
    assert [sample.prompt for sample in result.samples] == list(PROMPTS)
    assert all(sample.tokens == NEW and not sample.chat for sample in result.samples)
    different = [sample for sample in result.samples if sample.first_difference is not None]
    assert different, "4 bits change no text of a random model"
    assert {sample.source_complete for sample in different} == {cap is None}
    (speed,) = result.speed
    assert (speed.baselines["pytorch"].skipped is None) == (cap is None)  # type: ignore[union-attr]
    assert [stage.name for stage in result.stages].count("samples") == (cap is not None)


def test_the_profiles_key_is_strict() -> None:
    profile = {"name": "x", "description": "y"}
    assert parse_profile(profile, where="x").validation.sample_tokens == 32
    assert parse_profile({**profile, "validation": {"sample_tokens": 0}}, where="x").validation.sample_tokens == 0
    for value in (-1, 1025, "few", 1.5):
        with pytest.raises(UsageError, match="sample_tokens"):
            parse_profile({**profile, "validation": {"sample_tokens": value}}, where="x")
