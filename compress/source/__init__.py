"""From a model reference to a lazy :class:`~compress.contracts.Checkpoint`.

A source kind is one module of this package that defines ``SOURCE`` (see :class:`compress.source.base.Source`); it is
found by being here. Nothing contacts a network but the hub kind, and importing this package loads no library.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path

from compress.errors import SourceError
from compress.families import available_families, load_family
from compress.source.base import OpenCheckpoint, Source, require_tokenizer
from compress.tasks import retask

__all__ = ["OpenCheckpoint", "Source", "open_checkpoint", "require_tokenizer", "sources"]


@cache
def sources() -> tuple[Source, ...]:
    """Return every source kind, in the order in which they are asked."""
    modules = (importlib.import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__))
    found: list[Source] = [module.SOURCE for module in modules if hasattr(module, "SOURCE")]
    return tuple(sorted(found, key=lambda source: (source.priority, source.name)))


def open_checkpoint(
    reference: str,
    *,
    adapter: Path | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
    config_only: bool = False,
    task: str | None = None,
) -> OpenCheckpoint:
    """Open a model for reading tensor by tensor.

    Args:
        reference: A directory, a ``.gguf`` file, ``package:NAME/PATH`` or a hub id ``owner/name``.
        adapter: A PEFT LoRA adapter's directory, merged into the rows as they are read.
        revision: Branch, tag or commit of a hub id.
        cache_dir: Where the hub kind keeps downloads; its default cache if not given.
        config_only: Do not fetch weights, and accept that there are none (``has_weights`` says so).
        task: What the model shall do; default: what its architecture's head is for. The config then names that head.

    Returns:
        The checkpoint. Close it, or use it as a context, to release its files early.

    Raises:
        SourceError: The model, or the adapter, is missing, damaged, pickled or quantized already.
        UnsupportedModelError: The model would need code of its own, or its GGUF architecture has no mapping.
        UsageError: A revision was given for something that has none, or the model cannot do the task.
    """
    if not reference.strip() or "\0" in reference:
        raise SourceError("the model reference is empty or not a name", where=repr(reference))
    source = next((source for source in sources() if source.matches(reference)), None)
    if source is None:
        kinds = ", ".join(source.describes for source in sources())
        raise SourceError("this is not a model reference", where=reference, hint=f"give {kinds}, or a short name")
    base = source.open(reference, revision=revision, cache_dir=cache_dir, config_only=config_only)
    try:
        model_type = base.config.get("model_type")
        if task is not None:
            # The family of the model type: its own architecture may have a head that nobody exports.
            base.config = retask(base.config, task, load_family({"model_type": model_type}).architectures)
        elif base.config.get("architectures") is None and model_type in available_families():
            # Then it is what its family's first architecture is: everything behind reads one config.
            base.config = {**base.config, "architectures": [load_family({"model_type": model_type}).architectures[0]]}
        if adapter is None:
            return base
        from compress.source.adapter import merge_adapter

        return merge_adapter(base, adapter)
    except BaseException:
        base.close()
        raise
