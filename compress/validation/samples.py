"""What source and artifact write after the same prompts: the side that asks, and puts the answers together.

Nothing is started for it that does not run anyway: the reference worker encodes the prompts, the artifact's session
writes right after its drift, and the PyTorch baseline, which holds the whole source, writes the source's text. Where
there is no such baseline (it was not asked for, or does not fit into memory), the streamed source reads prompts and the
artifact's texts in one pass. Greedy texts are equal up to the first position where the most likely tokens differ, so
that pass finds the first difference too; of what the source would write behind it, it knows one token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from compress.errors import CompressError
from compress.report.model import Sample, Stage
from compress.validation.artifact import Artifact
from compress.validation.protocol import CheckpointSpec, Json, run_worker

#: A question, an instruction, the start of a story, a line of code.
PROMPTS = (
    "Why does bread rise when it is baked?",
    "Name three things to check before a long bicycle ride.",
    "The lighthouse had been dark for eleven years when",
    "def average(numbers):",
)


@dataclass(frozen=True)
class _Prompt:
    """A prompt, its ids, and how many tokens at most follow it."""

    text: str
    ids: tuple[int, ...]
    limit: int


@dataclass
class Sampling:
    """The samples of one validation, as far as they are.

    Attributes:
        artifact: Whose tokenizer, chat template and limits count.
        new_tokens: The most tokens a text; 0 for no samples.
        reason: Why there are none, where something went wrong.
        by_rows: The streamed source never holds a block.
        samples: The result.
    """

    artifact: Artifact
    new_tokens: int
    reason: str | None = None
    by_rows: bool = False
    samples: tuple[Sample, ...] = ()
    _prompts: list[_Prompt] = field(default_factory=list)
    _written: list[list[int]] = field(default_factory=list)
    _chat: bool = False
    _stop: list[int] = field(default_factory=list)

    def prompt_jobs(self) -> list[Json]:
        """Return the reference worker's job that encodes the prompts, if they are wanted."""
        if self.new_tokens < 1:
            return []
        return [{"kind": "prompts", "directory": str(self.artifact.directory), "texts": list(PROMPTS)}]

    def take_prompts(self, results: Sequence[Json]) -> None:
        """Take over its answer; a prompt that leaves no room in the context is left out."""
        for result in results:
            self.reason = result["reason"]
            self._chat, self._stop = bool(result["chat"]), list(result["stop"])
            for text, ids in zip(PROMPTS, result["ids"], strict=False):
                room = self.new_tokens
                if self.artifact.context_length is not None:
                    room = min(room, self.artifact.context_length - len(ids))
                if room > 0 and ids and max(ids) < self.artifact.vocab_size:
                    self._prompts.append(_Prompt(text, tuple(ids), room))
            if not self._prompts and self.reason is None:
                self.reason = "no prompt fits the model's context and vocabulary"

    def artifact_jobs(self) -> list[Json]:
        """Return the artifact worker's job, unless another provider has done it."""
        if not self._prompts or self._written:
            return []
        limits = [prompt.limit for prompt in self._prompts]
        return [{"kind": "samples", "prompts": self._ids(), "limits": limits, "stop": self._stop}]

    def take_written(self, results: Sequence[Json]) -> None:
        """Take over its answer; where the graph's cache had no room there is no sample."""
        for result in results:
            pairs = [
                (_Prompt(prompt.text, prompt.ids, limit), tokens)
                for prompt, limit, tokens in zip(self._prompts, result["limits"], result["tokens"], strict=True)
                if tokens
            ]
            self._prompts, self._written = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            if not pairs:
                self.reason = "no prompt fits the graph's cache"

    def source_job(self) -> Json | None:
        """Return what the source is asked, ``None`` where there is nothing to ask, or no longer."""
        if not self._written or self.samples:
            return None
        return {
            "kind": "samples",
            "directory": str(self.artifact.directory),
            "prompts": self._ids(),
            "written": self._written,
            "limits": [prompt.limit for prompt in self._prompts],
            "stop": self._stop,
            "by_rows": self.by_rows,
        }

    def take_source(self, result: Json) -> None:
        """Take over the source's answer: the samples are complete."""
        self.samples = tuple(
            Sample(prompt=prompt.text, chat=self._chat, tokens=prompt.limit, **answer)
            for prompt, answer in zip(self._prompts, result["samples"], strict=True)
        )

    def read_ahead(
        self, checkpoint: CheckpointSpec, threads: int, timeout: float, progress: Callable[[float], None]
    ) -> Stage | None:
        """Ask the streamed source, if nobody else has answered; what goes wrong is the reason why there is none."""
        job = self.source_job()
        if job is None:
            return None
        request = {"checkpoint": checkpoint.as_request(), "threads": threads, "jobs": [job]}
        start = time.perf_counter()
        try:
            response = run_worker("reference", request, timeout=timeout, progress=progress)
        except CompressError as error:
            self.reason = error.what
            return None
        self.take_source(response["results"][0])
        seconds = round(time.perf_counter() - start, 3)
        return Stage(name="samples", seconds=seconds, peak_rss_bytes=response["peak_rss_bytes"])

    def _ids(self) -> list[list[int]]:
        return [list(prompt.ids) for prompt in self._prompts]
