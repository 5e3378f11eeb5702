"""An encoder's outputs beside its source model's: the texts, both sides' runs, and what the report says of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.errors import CompressError
from compress.report.model import Cosine, Divergence, EncoderDrift, EvaluationText, Histogram, Stage, TaskAccuracy
from compress.validation import encoder_drift, evaluation, pieces, text
from compress.validation.artifact import Artifact
from compress.validation.encoded import Encoded, pack
from compress.validation.encoder_speed import EncoderSpeedPlan
from compress.validation.histogram import COSINE_EDGES, KL_EDGES
from compress.validation.labels import Labels, label_names
from compress.validation.logits import LogitsFile, check_disk
from compress.validation.on_provider import run_artifact
from compress.validation.protocol import Json, run_worker
from compress.validation.run import CheckpointSpec, Progress, output_of, since

DEFAULT_MAX_LENGTH = 256
UNITS = {"token-classification": "tokens", "fill-mask": "masked positions"}


@dataclass(frozen=True)
class Source:
    """How the reference worker runs the source model; ``pooling`` is ``mean``, ``cls``, ``max`` or ``none``."""

    checkpoint: CheckpointSpec
    pooling: str
    normalize: bool
    memory_cap: int | None

    def as_request(self) -> Json:
        """Return it as the worker takes it."""
        return {
            "checkpoint": self.checkpoint.as_request(),
            "pooling": self.pooling,
            "normalize": self.normalize,
            "memory_cap": self.memory_cap,
        }


@dataclass(frozen=True)
class Texts:
    """Texts of one purpose on disk, and the source model's outputs for them."""

    encoded: Encoded
    path: Path
    outputs: Path
    max_length: int


@dataclass(frozen=True)
class Reference:
    """What the artifact is held against; ``labelled`` only with the user's labels."""

    eval_text: text.Text
    drift: Texts
    labels: Labels | None
    labelled: Texts | None
    dtype: str


def make_reference(
    artifact: Artifact,
    source: Source,
    eval_text: Path | None,
    labels: Labels | None,
    count: int,
    max_length: int | None,
    plan: EncoderSpeedPlan,
    work: Path,
    stages: list[Stage],
    progress: Progress,
) -> Reference:
    """Tokenize the texts and write the source model's outputs for them into ``work``."""
    context = artifact.context_length or DEFAULT_MAX_LENGTH
    length = max_length or min(DEFAULT_MAX_LENGTH, context)
    chosen = text.embedded("evaluation") if eval_text is None else text.from_file(eval_text, count * length)
    drift = _texts(pieces.drift_texts(chosen, artifact, count=count, max_length=length), "drift", length, work)
    labelled = None
    if labels is not None:
        labelled = _texts(
            _encode_labels(labels, artifact, max_length or context), "labels", max_length or context, work
        )
    both = [item for item in (drift, labelled) if item is not None]
    rows = sum(item.encoded.rows(artifact.task) for item in both)
    check_disk(work, 2 * rows * _columns(artifact) * 4)
    request = {
        **source.as_request(),
        "threads": plan.threads,
        "jobs": [_job(artifact, item, item.outputs) for item in both],
    }
    start = time.perf_counter()
    response = run_worker(
        "encoder_reference", request, timeout=plan.timeout, progress=lambda fraction: progress("reference", fraction)
    )
    stages.append(Stage(name="reference", seconds=since(start), peak_rss_bytes=response["peak_rss_bytes"]))
    first = response["results"][0]
    if first["task"] != artifact.task:
        raise CompressError(
            f"the source model's task is {first['task']}, the artifact's {artifact.task}",
            where=source.checkpoint.reference,
            hint="give the model that the artifact was made from, and its --task",
        )
    return Reference(chosen, drift, labels, labelled, str(first["dtype"]))


def measure_drift(
    artifact: Artifact, provider: str, reference: Reference, plan: EncoderSpeedPlan, work: Path, progress: Progress
) -> tuple[EncoderDrift, Json]:
    """Run an artifact on the reference's texts; return drift and the worker's response.

    Raises:
        CompressError: The worker failed, or outputs are not finite or not the source model's in shape.
    """
    output, labelled = output_of(work, provider), work / "artifact-labels.npy"
    response = run_drift(artifact, provider, reference, output, plan, progress, labelled)
    found = compare(artifact, provider, reference, output)
    if reference.labels is None or reference.labelled is None:
        return found, response
    accuracy: TaskAccuracy = evaluation.evaluate(
        reference.labels,
        artifact.task,
        np.load(reference.labelled.outputs),
        np.load(labelled),
        truncated=reference.labelled.encoded.truncated,
        max_length=reference.labelled.max_length,
    )
    return found.model_copy(update={"task_accuracy": accuracy}), response


def run_drift(
    artifact: Artifact,
    provider: str,
    reference: Reference,
    output: Path,
    plan: EncoderSpeedPlan,
    progress: Progress,
    labelled: Path | None = None,
) -> Json:
    """Write an artifact's outputs for the drift texts and, where ``labelled`` says where to, for the labelled ones."""
    jobs = [_job(artifact, reference.drift, output)]
    if reference.labelled is not None and labelled is not None:
        jobs.append(_job(artifact, reference.labelled, labelled))
    return run_artifact(
        artifact, provider, jobs, plan.threads, plan.timeout, lambda fraction: progress("drift", fraction)
    )


def compare(artifact: Artifact, provider: str, reference: Reference, output: Path) -> EncoderDrift:
    """Compare an artifact's outputs for the drift texts with the source model's."""
    encoded, task = reference.drift.encoded, artifact.task
    common = {
        "provider": provider,
        "task": task,
        "texts": len(encoded),
        "tokens": len(encoded.ids),
        "unit": UNITS.get(task, "texts"),
        "max_length": reference.drift.max_length,
        "batch": batch_of(task),
        "eval_text": EvaluationText(name=reference.eval_text.name, sha256=reference.eval_text.sha256),
        "reference": f"PyTorch float32 of {reference.dtype} weights",
    }
    if task == "embedding":
        near = encoder_drift.measure_embeddings(np.load(reference.drift.outputs), np.load(output))
        cosine = Cosine(mean=near.cosine_mean, min=near.cosine_min, standard_error=near.cosine_error)
        embedded = {
            "neighbour_agreement": near.neighbour_agreement,
            "neighbour_agreement_error": near.neighbour_error,
            "distribution": Histogram(measure="cosine_distance", edges=COSINE_EDGES, counts=near.distance_counts),
        }
        return EncoderDrift.model_validate({**common, "items": near.texts, "cosine": cosine, **embedded})
    left, right = LogitsFile(reference.drift.outputs), LogitsFile(output)
    counts = encoded.rows_of_texts(task)
    if task == "question-answering":
        seen = encoder_drift.measure_spans(left, right, counts)
    else:
        seen = encoder_drift.measure_labels(left, right, counts, head_of(artifact, left.shape[1]))
    divergence = None
    if seen.kl_mean is not None:
        divergence = Divergence(mean=seen.kl_mean, standard_error=seen.kl_error, p99=seen.kl_p99 or 0.0)
    labels = {"label_agreement": seen.label_agreement, "label_agreement_error": seen.label_error}
    spread = None if seen.kl_counts is None else Histogram(measure="kl", edges=KL_EDGES, counts=seen.kl_counts)
    scores = {"logit_max_abs": seen.logit_max_abs, "kl_divergence": divergence, "distribution": spread}
    return EncoderDrift.model_validate({**common, "items": seen.items, **labels, **scores})


def head_of(artifact: Artifact, columns: int) -> encoder_drift.Head:
    """Return what a row of a model's scores means, by its config and its width."""
    if artifact.task == "text-classification":
        if artifact.config.get("problem_type") == "multi_label_classification":
            return "multi_label"
        if columns == 1:
            return "regression"
    return "single_label"


def batch_of(task: str) -> int:
    """Return how many texts are padded together; a distribution over the vocabulary a token takes memory."""
    return 2 if task == "fill-mask" else 8


def _job(artifact: Artifact, texts: Texts, output: Path) -> Json:
    return {
        "kind": "encode",
        "texts": str(texts.path),
        "task": artifact.task,
        "batch": batch_of(artifact.task),
        "pad_id": artifact.pad_id,
        "output": str(output),
    }


def _texts(encoded: Encoded, name: str, max_length: int, work: Path) -> Texts:
    path = work / f"{name}.npz"
    encoded.save(path)
    return Texts(encoded, path, work / f"{name}-reference.npy", max_length)


def _encode_labels(labels: Labels, artifact: Artifact, max_length: int) -> Encoded:
    tokens = pieces.tokenize(evaluation.inputs(labels, artifact.task), artifact, max_length)
    return pack(
        [item.ids for item in tokens],
        [item.types for item in tokens],
        [[True] * len(item.ids) for item in tokens],
        sum(item.truncated for item in tokens),
    )


def _columns(artifact: Artifact) -> int:
    """Return about how wide a row of outputs is."""
    if artifact.task == "fill-mask":
        return artifact.vocab_size
    if artifact.task == "embedding":
        hidden = artifact.config.get("hidden_size", artifact.config.get("dim"))
        return hidden if isinstance(hidden, int) else 1024
    return len(label_names(artifact.config) or [0, 0])
