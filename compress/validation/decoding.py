"""A decoder graph driven with its key/value cache, by its inputs' names and types alone.

Inputs: ``input_ids`` int64 ``[batch, new]``, ``attention_mask`` int64 ``[batch, past + new]``, ``position_ids`` int64
``[batch, new]`` (optional), ``past_key_values.N.key/value`` ``[batch, kv_heads, past, head_dim]``, and
``logits_to_keep`` int64 (optional, an initializer with a default: 0 keeps every position, k the last k). Outputs:
``logits`` ``[batch, kept, vocab]`` and ``present.N.key/value``. The cache stays in ONNX Runtime's memory between steps,
on the provider's own device where it has one: copies to the host and back made steps 1.1 to 1.6 times as long on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.contracts import CacheType
from compress.errors import CompressError

PAST, PRESENT, KEEP = "past_key_values.", "present.", "logits_to_keep"
_CACHE_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


class CachedDecoder:
    """One sequence batch fed piece by piece to an ``onnxruntime.InferenceSession``.

    ``at_once`` is the most tokens that one run of the graph may be given, ``None`` for any number. ``device`` is where
    the cache is kept, as ONNX Runtime names devices; ``None`` for the host. With a ``capacity`` the cache is one
    buffer of so many positions that every run writes its own into, as onnxruntime-genai does; ``GroupQueryAttention``
    can do that. It is on the host. Without one, every run copies what there is into a new cache.

    Raises:
        CompressError: The graph's inputs and outputs are not those of a decoder.
        ValueError: Both a device and a capacity are given.
    """

    def __init__(
        self,
        session: Any,  # noqa: ANN401 - onnxruntime has no stubs
        at_once: int | None = None,
        device: str | None = None,
        capacity: int | None = None,
    ) -> None:
        from onnxruntime import OrtValue

        if capacity is not None and device is not None:
            raise ValueError("a cache of a fixed capacity is kept on the host")
        self._session, self._value, self._at_once = session, OrtValue.ortvalue_from_numpy, at_once
        self._device, self._capacity = device, capacity
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = {value.name: value for value in session.get_outputs()}
        self._past = {name: value for name, value in inputs.items() if name.startswith(PAST)}
        unknown = set(inputs) - set(self._past) - {"input_ids", "attention_mask", "position_ids", KEEP}
        missing = {"input_ids", "attention_mask"} - set(inputs)
        absent = ({"logits"} | {PRESENT + name.removeprefix(PAST) for name in self._past}) - set(outputs)
        if unknown or missing or absent or not self._past:
            raise CompressError(
                "the graph is not a decoder with a key/value cache",
                where=f"unknown inputs {sorted(unknown)}, missing inputs {sorted(missing)}, "
                f"missing outputs {sorted(absent)}, {len(self._past)} cache inputs",
            )
        self._positions, self._logits = "position_ids" in inputs, outputs["logits"]
        self._keep = next(
            (v for v in [*session.get_overridable_initializers(), *session.get_inputs()] if v.name == KEEP), None
        )
        self._cache: dict[str, Any] = {}
        self.length = 0

    @property
    def cache_type(self) -> CacheType:
        """How the graph keeps keys and values."""
        return "int8" if any(value.type == "tensor(int8)" for value in self._past.values()) else "float"

    @property
    def trims_logits(self) -> bool:
        """Whether the graph can leave out the logits of all but the last positions."""
        return self._keep is not None

    def reset(self) -> None:
        """Forget the sequence."""
        self._cache, self.length = {}, 0

    def keep(self, length: int) -> None:
        """Forget all but the first ``length`` positions; what they hold does not depend on those behind them."""
        if length == 0:
            self.reset()
        elif self._capacity is not None:
            self.length = min(length, self.length)
        elif length < self.length:
            kept = {name: value.numpy()[:, :, :length] for name, value in self._cache.items()}
            self._cache = {name: self._value(np.ascontiguousarray(array)) for name, array in kept.items()}
            self.length = length

    def feed(self, ids: npt.NDArray[np.int64], keep: int = 0) -> npt.NDArray[np.float32]:
        """Append ``ids`` int64 ``[batch, new]`` and return float32 logits ``[batch, kept, vocab]``.

        Args:
            ids: The next tokens of every sequence.
            keep: 0 for the logits of every new position, k for the last k (a graph that cannot trim returns all).
        """
        step = self._at_once or ids.shape[1]
        if ids.shape[1] <= step:
            return self._run(ids, keep)
        pieces = [self._run(ids[:, start : start + step], 0) for start in range(0, ids.shape[1], step)]
        logits = np.concatenate(pieces, axis=1)
        return logits[:, -keep:] if keep and self.trims_logits else logits

    def _run(self, ids: npt.NDArray[np.int64], keep: int) -> npt.NDArray[np.float32]:
        batch, new = ids.shape
        total = self.length + new
        feeds = {"input_ids": ids.astype(np.int64, copy=False), "attention_mask": np.ones((batch, total), np.int64)}
        if self._positions:
            feeds["position_ids"] = np.broadcast_to(np.arange(self.length, total, dtype=np.int64), (batch, new))
        if self._keep is not None:
            feeds[KEEP] = np.full([1] * len(self._keep.shape), keep, np.int64)
        if not self._cache:
            feeds |= {name: empty_cache(value, batch, self._capacity or 0) for name, value in self._past.items()}
        values = {name: self._value(np.ascontiguousarray(array)) for name, array in feeds.items()} | self._cache
        names = ["logits", *(PRESENT + name.removeprefix(PAST) for name in self._past)]
        if self._capacity is not None:
            if total > self._capacity:
                raise CompressError(f"{total} positions do not fit a cache of {self._capacity}")
            rows = min(keep, new) if keep and self.trims_logits else new
            empty = _empty(self._logits, [batch, rows, self._logits.shape[-1]])
            into = [empty, *(values[name] for name in self._past)]
            logits, *present = _run_vectors(self._session, names, values, ["cpu"] * len(names), into)
        elif self._device is None:
            logits, *present = self._session.run_with_ort_values(names, values)
        else:
            logits, *present = _run_vectors(self._session, names, values, ["cpu", *[self._device] * (len(names) - 1)])
        self._cache = dict(zip(self._past, present, strict=True))
        self.length = total
        result: npt.NDArray[np.float32] = logits.numpy().astype(np.float32, copy=False)
        return result


def empty_cache(value: Any, batch: int, positions: int = 0) -> npt.NDArray[Any]:  # noqa: ANN401 - onnxruntime has no stubs
    """Return a cache that holds nothing, of so many positions, for one cache input of a session.

    Raises:
        CompressError: Heads and head size are no numbers in the graph, or its type is none of a cache.
    """
    shape = list(value.shape)
    if len(shape) != 4 or not all(isinstance(size, int) for size in (shape[1], shape[3])):
        raise CompressError(
            f"the cache input's shape is {shape}, not [batch, kv_heads, past, head_dim]", where=value.name
        )
    if value.type not in _CACHE_TYPES:
        raise CompressError(f"a cache of {value.type} is not supported", where=value.name)
    return np.zeros((batch, shape[1], positions, shape[3]), _CACHE_TYPES[value.type])


def _run_vectors(
    session: Any,  # noqa: ANN401 - onnxruntime has no stubs
    names: list[str],
    values: Mapping[str, Any],
    places: list[str],
    into: Sequence[Any] = (),
) -> list[Any]:
    """Run a session whose outputs are left on the devices ``places``, or written ``into`` these; return ``OrtValue``s.

    Not an IOBinding: that refuses an input which has a default (it looks among the required ones only).
    """
    from onnxruntime import OrtDevice, OrtValue, RunOptions
    from onnxruntime.capi.onnxruntime_pybind11_state import OrtValueVector

    feeds, fetches = OrtValueVector(), OrtValueVector()
    for vector, given in ((feeds, values.values()), (fetches, into)):
        for value in given:
            vector.push_back(value._ortvalue)
    devices = [OrtDevice.make(place, 0)._get_c_device() for place in places]
    session.run_with_ortvaluevector(RunOptions(), list(values), feeds, names, fetches, devices)
    # A value over an array of numpy's keeps that alive; another one over the same memory would not.
    return list(into) or [OrtValue(value) for value in fetches]


def _empty(output: Any, shape: list[int]) -> Any:  # noqa: ANN401 - onnxruntime has no stubs
    """Return an ``OrtValue`` of ``shape`` on the host for a float output to be written into."""
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_shape_and_type(shape, _CACHE_TYPES[output.type])
