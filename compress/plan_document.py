"""The plan as a document: what ``compress plan --json`` prints and :func:`compress.plan` returns."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from compress.report.model import Allocation


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PeakMemory(_Strict):
    """Predicted bytes of all processes together, by stage; ``export`` is the largest of those that make the files.

    ``validation_in_pieces`` is the least that a validation can do with, where the artifact is run a block at a time and
    only its drift is measured; ``None`` where it cannot.
    """

    graph: int
    weights: int
    calibration: int
    ranges: int
    export: int
    validation: int
    validation_in_pieces: int | None


class PlannedTensor(_Strict):
    """A tensor's fate: how it would be stored (``int4 b32 sym``, ``float32``), by which algorithm, in how many bytes.

    ``shape`` is rows and columns, of a vector its length. ``algorithm`` is ``None`` where nothing is quantized.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    storage: str
    algorithm: str | None
    bytes: int


class PredictedRun(_Strict):
    """A run of the artifact, and of the source in float32 ONNX, as predicted; ``speedup`` above 1 is faster.

    ``run``: ``prefill`` and ``decode`` of a decoder, ``latency`` of an encoder; ``batch`` sequences of ``tokens`` new
    tokens after ``past`` ones.
    """

    run: str
    batch: int
    tokens: int
    past: int
    ms: float
    float_ms: float
    tokens_per_second: float
    float_tokens_per_second: float
    speedup: float


class PredictedSpeed(_Strict):
    """How fast the artifact would be on this machine, added up from measured parts (docs/performance.md)."""

    cpu: str
    onnxruntime: str
    threads: int
    runs: tuple[PredictedRun, ...]


class PlanDocument(_Strict):
    """What an export would do. Sizes in bytes; nothing was measured but for ``allocation`` and ``predicted_speed``.

    Attributes:
        schema_version: 1.
        model: The source's identifier.
        model_type: Its config's ``model_type``.
        task: What the graph would do (``text-generation``, ``embedding``, ...).
        profile: The profile's name.
        parameters: Weights, a tied table counted once.
        bits_per_weight: Scales and zero points included.
        source_bytes: The source's weights.
        predicted_bytes: Graph and weights of the artifact.
        cache_bytes_per_token: What keys and values of a token take while the artifact writes; ``None`` where there is
            no cache, or one of a fixed size.
        predicted_peak_memory: By stage.
        predicted_calibration_seconds: On this machine; ``None`` where nothing is calibrated.
        tensors: Every tensor's fate.
        allocation: How bits were chosen under a budget, by errors that were measured; ``None`` where roles decide.
        predicted_speed: On this machine, from parts that were measured on it; ``None`` where it was not asked for.
    """

    schema_version: Literal[1]
    model: str
    model_type: str
    task: str
    profile: str
    parameters: int
    bits_per_weight: float
    source_bytes: int
    predicted_bytes: int
    cache_bytes_per_token: int | None = None
    predicted_peak_memory: PeakMemory
    predicted_calibration_seconds: float | None
    tensors: tuple[PlannedTensor, ...]
    allocation: Allocation | None = None
    predicted_speed: PredictedSpeed | None = None
