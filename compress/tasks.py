"""Tasks: what a model's head answers. A task is read from the architecture's name, or asked for with ``--task``.

Names are the pipeline names of transformers. The graph's outputs carry the names that optimum and transformers.js read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.errors import UnsupportedModelError, UsageError, did_you_mean


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: Its name.
        aliases: Other names that mean the same.
        suffixes: Ends of architecture names that have its head; the first is how transformers calls the class.
        outputs: Graph outputs. ``logits`` is ``[batch, labels]`` for text-classification, ``[batch, sequence, labels]``
            for token-classification, ``[batch, sequence, vocabulary]`` for fill-mask; ``start_logits`` and
            ``end_logits`` are ``[batch, sequence]``; ``last_hidden_state`` is ``[batch, sequence, hidden]`` and
            ``sentence_embedding`` ``[batch, hidden]`` (absent where the profile pools nothing).
    """

    name: str
    aliases: tuple[str, ...]
    suffixes: tuple[str, ...]
    outputs: tuple[str, ...]


TASKS = (
    Task("text-generation", ("causal-lm",), ("ForCausalLM", "LMHeadModel"), ("logits",)),
    Task("text-classification", ("sequence-classification",), ("ForSequenceClassification",), ("logits",)),
    Task("token-classification", ("ner",), ("ForTokenClassification",), ("logits",)),
    Task("question-answering", (), ("ForQuestionAnswering",), ("start_logits", "end_logits")),
    Task("fill-mask", ("masked-lm",), ("ForMaskedLM",), ("logits",)),
    # Last: its suffix is the least specific. A pretraining head answers nothing that a user would ask.
    Task(
        "embedding",
        ("feature-extraction", "sentence-similarity"),
        ("Model", "ForPreTraining"),
        ("last_hidden_state", "sentence_embedding"),
    ),
)


def load_task(name: str) -> Task:
    """Return the task of a name or an alias.

    Raises:
        UsageError: There is none.
    """
    for task in TASKS:
        if name in (task.name, *task.aliases):
            return task
    raise UsageError(f"unknown task {name!r}", hint=did_you_mean(name, [task.name for task in TASKS]))


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """Return the first architecture that a config names, ``None`` if it names none."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return first if isinstance(first, str) else None


def task_of(config: Mapping[str, Any]) -> Task:
    """Return the task whose head a config's first architecture has.

    Raises:
        UnsupportedModelError: The config names no architecture, or one with another kind of head.
    """
    architecture = architecture_of(config)
    if architecture is None:
        raise UnsupportedModelError("config.json names no architecture", hint="say what the model does: --task NAME")
    for task in TASKS:
        if architecture.endswith(task.suffixes):
            return task
    names = ", ".join(task.name for task in TASKS)
    raise UnsupportedModelError(f"architecture {architecture[:80]!r} has no task here", hint=f"--task: {names}")


def retask(config: Mapping[str, Any], name: str, architectures: tuple[str, ...]) -> dict[str, Any]:
    """Return the config with the architecture that answers another task.

    Args:
        config: The model's config.
        name: The task asked for.
        architectures: What its family exports.

    Raises:
        UsageError: The family has no architecture for the task.
    """
    task = load_task(name)
    tasks = {name: task_of({"architectures": [name]}) for name in architectures}
    # By the first suffix that one has; GPT2LMHeadModel ends in "Model", and yet is no embedding.
    able = [name for suffix in task.suffixes for name in architectures if tasks[name] is task and name.endswith(suffix)]
    found = able[0] if able else None
    if found is None:
        known = sorted({other.name for other in tasks.values()})
        raise UsageError(f"this model cannot do {task.name}", hint=f"it can: {', '.join(known)}")
    return {**config, "architectures": [found]}
