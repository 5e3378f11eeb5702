"""The worker that runs an encoder's source model in PyTorch: ``python -m compress.validation.encoder_reference``.

Request (see ``protocol``): ``checkpoint`` {reference, adapter, revision, task}, ``pooling``, ``normalize``,
``memory_cap`` (bytes or null), ``threads``, ``jobs`` as in ``encoding``. The model is transformers' own class in
float32 with every tensor of the checkpoint (an adapter merged into them), the names mapped by transformers.

It shares no step with the graphs that it judges: texts are never padded (only those of equal length run together), and
pooling and normalisation are computed here in float64.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compress.contracts import Checkpoint
from compress.errors import CompressError, SourceError, UnsupportedModelError
from compress.tasks import architecture_of, task_of
from compress.validation.encoded import Batch, Encoded, unpadded_batches
from compress.validation.encoding import Progress, outputs_of, random_batch, rows_of, timed, write_rows
from compress.validation.memory import check_memory
from compress.validation.protocol import Json, peak_rss_bytes, report_progress, serve
from compress.validation.reference import storage_type, versions

#: The weights as they are read, transformers' copy of them, and activations.
MEMORY_FACTOR = 2.2
POOLINGS = ("mean", "cls", "max", "none")


def handle(request: Json, job: Path) -> Json:
    """Load the model, run the jobs in order, and answer."""
    from compress.source import open_checkpoint

    torch.set_num_threads(int(request["threads"]))
    wanted = request["checkpoint"]
    adapter = wanted.get("adapter")
    with open_checkpoint(
        wanted["reference"],
        adapter=Path(adapter) if adapter else None,
        revision=wanted.get("revision"),
        task=wanted.get("task"),
    ) as checkpoint:
        start = time.perf_counter()
        model = load_model(checkpoint, request.get("memory_cap"))
        load_seconds = time.perf_counter() - start
        task, dtype = task_of(checkpoint.config).name, storage_type(checkpoint)
    reference = Reference(model, task, str(request.get("pooling", "none")), bool(request.get("normalize", False)))
    jobs = request["jobs"]
    results = []
    for index, item in enumerate(jobs):
        part = _part(job, index, len(jobs))
        if item["kind"] == "encode":
            results.append({**_encode(reference, item, part), "dtype": dtype, "task": task})
        elif item["kind"] == "latency":
            results.append(_latency(reference, item, part))
        else:
            raise CompressError(f"unknown job {item['kind']!r}", where="request")
    return {
        "results": results,
        "load_seconds": load_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "placement": None,
        "evidence": "measured",
        "versions": versions(),
    }


def load_model(checkpoint: Checkpoint, memory_cap: int | None = None) -> Any:  # noqa: ANN401 - a transformers model
    """Build the task's transformers model in float32 with the checkpoint's weights.

    Raises:
        ResourceError: It is predicted not to fit.
        SourceError: The checkpoint lacks weights that the task needs, or their shapes are not the config's.
        UnsupportedModelError: transformers has no such class.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    infos = checkpoint.tensors()
    elements = sum(int(np.prod(info.shape, dtype=np.int64)) for info in infos.values())
    check_memory(int(elements * 4 * MEMORY_FACTOR), memory_cap)
    task = task_of(checkpoint.config).name
    kind, config = _model_class(transformers, checkpoint)
    # Integers are position numbers, saved by old versions of transformers; models make them themselves.
    floats = [name for name, info in infos.items() if not re.fullmatch(r"[IU]\d+|BOOL", info.dtype)]
    weights = {name: torch.from_numpy(checkpoint.read(name)) for name in floats}
    try:
        model, info = kind.from_pretrained(
            None, config=config, state_dict=weights, output_loading_info=True, dtype=torch.float32
        )
    except RuntimeError as error:
        raise SourceError(
            f"the weights do not fit the config: {str(error).splitlines()[0]}", where=checkpoint.reference
        ) from error
    # An embedding is taken from the hidden states: whether there is a pooler makes no difference.
    missing = sorted(name for name in info["missing_keys"] if not (task == "embedding" and "pooler" in name.split(".")))
    if missing:
        raise SourceError(_what_is_missing(task, missing, model), where=checkpoint.reference)
    model.config.return_dict = True
    return model.eval()


def _model_class(transformers: Any, checkpoint: Checkpoint) -> tuple[Any, Any]:  # noqa: ANN401
    architecture = architecture_of(checkpoint.config) or ""
    model_type, known = checkpoint.config.get("model_type"), transformers.CONFIG_MAPPING
    config_class = known[model_type] if model_type in known else None  # noqa: SIM401 - a lazy mapping without get()
    kind = getattr(transformers, architecture, None) if architecture.isidentifier() else None
    if architecture.endswith("ForPreTraining"):  # it answers with its base model's hidden states
        kind = None if config_class is None else transformers.MODEL_MAPPING.get(config_class)
    if config_class is None or not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise UnsupportedModelError(
            f"transformers has no model {architecture[:80]!r} to compare with", where=checkpoint.reference
        )
    return kind, config_class.from_dict(dict(checkpoint.config))


def _what_is_missing(task: str, missing: list[str], model: Any) -> str:  # noqa: ANN401
    """Say which weights are missing: transformers would have made them up."""
    prefix = f"{model.base_model_prefix}."
    head = [name for name in missing if not name.startswith(prefix) or ".pooler." in name]
    if task != "embedding" and len(head) == len(missing):
        return f"the checkpoint has no {task} head: {missing[0]} is missing"
    return f"the checkpoint lacks {len(missing)} weights of the model, the first is {missing[0]}"


class Reference:
    """The source model with its pooling; ``pooling`` and ``normalize`` matter to embeddings alone."""

    def __init__(self, model: Any, task: str, pooling: str, normalize: bool) -> None:  # noqa: ANN401
        import inspect

        if pooling not in POOLINGS:
            raise CompressError(f"unknown pooling {pooling!r}", where=f"known: {', '.join(POOLINGS)}")
        self._model, self.task, self._pooling, self._normalize = model, task, pooling, normalize
        self._typed = "token_type_ids" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Any:  # noqa: ANN401 - transformers' output
        """Run the model on a batch."""
        given = {"input_ids": torch.from_numpy(batch.ids), "attention_mask": torch.from_numpy(batch.mask)}
        if self._typed:
            given["token_type_ids"] = torch.from_numpy(batch.types)
        return self._model(**given)

    def rows(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Return what is compared of an unpadded batch, float32 ``[rows, columns]``."""
        found = self.forward(batch)
        if self.task != "embedding":
            names = outputs_of(self.task, list(found.keys()))
            return rows_of(self.task, {name: found[name].numpy() for name in names}, batch)
        return pooled(found.last_hidden_state.numpy(), self._pooling, self._normalize)


def pooled(hidden: npt.NDArray[np.float32], pooling: str, normalize: bool) -> npt.NDArray[np.float32]:
    """Return sentence embeddings ``[batch, hidden]`` of hidden states ``[batch, sequence, hidden]`` without padding.

    ``none`` is the mean too: it is what a caller that pools nothing in the graph is compared by.
    """
    states = hidden.astype(np.float64)
    if pooling == "cls":
        vectors = states[:, 0]
    elif pooling == "max":
        vectors = states.max(axis=1)
    else:
        vectors = states.mean(axis=1)
    if normalize:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors.astype(np.float32)


def _encode(reference: Reference, item: Json, progress: Progress) -> Json:
    encoded = Encoded.load(item["texts"])
    batches = unpadded_batches(encoded, int(item["batch"]))
    return write_rows(encoded, reference.task, item["output"], batches, reference.rows, progress)


def _latency(reference: Reference, item: Json, progress: Progress) -> Json:
    found: list[list[float]] = []
    for batch, length in item["points"]:
        tokens = random_batch(batch, length, int(item["vocab_size"]))
        found.append(timed(lambda: reference.forward(tokens), item["seconds"], int(item["runs"])))  # noqa: B023
        progress(len(found) / len(item["points"]))
    return {"seconds": found}


def _part(job: Path, index: int, count: int) -> Progress:
    return lambda fraction: report_progress(job, (index + fraction) / count)


if __name__ == "__main__":
    sys.exit(serve(handle))
