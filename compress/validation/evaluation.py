"""Task scores of both sides on the user's labelled examples, and their paired difference: arrays in, numbers out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from compress.errors import CompressError
from compress.report.model import EvaluationText, Flips, TaskAccuracy
from compress.validation.encoder_drift import nearest, unit
from compress.validation.labels import Example, Labels
from compress.validation.paired import accuracy_interval, spearman, spearman_interval
from compress.validation.pieces import Pair

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Scores = npt.NDArray[np.floating]

TANGO = "paired 95 % score interval (Tango 1998)"
BOOTSTRAP = "paired 95 % bootstrap over examples (2000 resamples, seed 0)"


def inputs(labels: Labels, task: str) -> list[Pair]:
    """Return what the model is run on: for graded similarity of embeddings, the two texts of an example in turn."""
    if task == "embedding" and labels.kind == "score":
        return [(text, None) for example in labels.examples for text in _both(example)]
    return [(example.text, example.other) for example in labels.examples]


def _both(example: Example) -> tuple[str, str]:
    return example.text, example.other or ""


def evaluate(
    labels: Labels, task: str, reference: Scores, artifact: Scores, *, truncated: int, max_length: int
) -> TaskAccuracy:
    """Compare both sides' answers on the same examples.

    Args:
        labels: The examples.
        task: The model's task.
        reference: Its outputs for ``inputs``, float ``[inputs, columns]``: embeddings or scores.
        artifact: The artifact's, same shape.
        truncated: Inputs that were cut.
        max_length: Where, in tokens.

    Raises:
        CompressError: An output is not finite, or one side says the same of every example; or the model has fewer
            outputs than labels.
    """
    if reference.shape != artifact.shape or reference.ndim != 2:
        raise CompressError(
            f"outputs are {list(reference.shape)} in the source, {list(artifact.shape)} in the artifact"
        )
    truth = np.array([example.truth for example in labels.examples])
    common = {
        "labels": EvaluationText(name=labels.name, sha256=labels.sha256),
        "examples": len(truth),
        "truncated": truncated,
        "max_length": max_length,
    }
    if labels.kind == "score":
        return _ranked(common, truth, _said(reference, task, "reference"), _said(artifact, task, "artifact"))
    groups = truth.astype(np.int64)
    if labels.kind == "neighbour":
        answers = [groups[nearest(unit(side, which))] for side, which in _sides(reference, artifact)]
        return _counted(common, "neighbour_accuracy", groups, *answers)
    if groups.max() >= reference.shape[1]:
        raise CompressError(f"the model has {reference.shape[1]} outputs, the labels name class {groups.max()}")
    answers = [_finite(side, which).argmax(axis=1) for side, which in _sides(reference, artifact)]
    return _counted(common, "accuracy", groups, *answers)


def flips(truth: IntArray, reference: IntArray, artifact: IntArray) -> Flips:
    """Count changed answers int64 ``[examples]``."""
    before, after = reference == truth, artifact == truth
    return Flips(
        right_to_wrong=int((before & ~after).sum()),
        wrong_to_right=int((~before & after).sum()),
        changed=int((reference != artifact).sum()),
    )


def _counted(
    common: dict[str, object], metric: str, truth: IntArray, reference: IntArray, artifact: IntArray
) -> TaskAccuracy:
    changed, count = flips(truth, reference, artifact), len(truth)
    right = [float((side == truth).mean()) for side in (reference, artifact)]
    return TaskAccuracy.model_validate(
        {
            **common,
            "metric": metric,
            "reference": right[0],
            "artifact": right[1],
            "difference": (changed.wrong_to_right - changed.right_to_wrong) / count,
            "interval": accuracy_interval(changed.right_to_wrong, changed.wrong_to_right, count),
            "interval_method": TANGO,
            "flips": changed,
        }
    )


def _ranked(common: dict[str, object], truth: FloatArray, reference: FloatArray, artifact: FloatArray) -> TaskAccuracy:
    found = [spearman(side, truth) for side in (reference, artifact)]
    for value, which in zip(found, ("reference", "artifact"), strict=True):
        if not np.isfinite(value):
            raise CompressError(f"the {which} gives every example the same score")
    return TaskAccuracy.model_validate(
        {
            **common,
            "metric": "spearman",
            "reference": found[0],
            "artifact": found[1],
            "difference": found[1] - found[0],
            "interval": spearman_interval(truth, reference, artifact),
            "interval_method": BOOTSTRAP,
            "flips": None,
        }
    )


def _said(outputs: Scores, task: str, which: str) -> FloatArray:
    """Return a score an example: the cosine of its two embeddings, or the model's one output."""
    if task == "embedding":
        vectors = unit(outputs, which)
        cosines: FloatArray = (vectors[::2] * vectors[1::2]).sum(axis=1)
        return cosines
    return _finite(outputs, which)[:, 0]


def _finite(outputs: Scores, which: str) -> FloatArray:
    wide = outputs.astype(np.float64)
    if not np.isfinite(wide).all():
        raise CompressError(f"the {which} gave scores that are not finite")
    return wide


def _sides(reference: Scores, artifact: Scores) -> tuple[tuple[Scores, str], tuple[Scores, str]]:
    return (reference, "reference"), (artifact, "artifact")
