"""What a run will take: peak memory of every stage, predicted from sizes alone and held against ``--max-memory``.

Constants are the resident set of a process that has only imported its libraries, measured on Linux x86-64 with the
versions pinned in pyproject.toml; the rest follows from the buffers that the code holds. A stage's prediction is
for all its processes together: while weights stream, the skeleton's worker runs beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.contracts import Encoder
from compress.errors import ResourceError
from compress.planning import Fate, Plan, make_plan
from compress.profile import Budget, Profile, load_profile
from compress.reading import CHUNK_WEIGHTS
from compress.sizes import format_size
from compress.validation import room

if TYPE_CHECKING:
    from compress.package.target import Wish
    from compress.pipeline import ExportOptions

_MB = 1_000_000
#: Python with numpy, onnx-ir and the command line.
_MAIN = 130 * _MB
#: mobius, torch and transformers, before the graph is built.
_SKELETON = 390 * _MB
#: torch, transformers, optimum and the exporter; the model itself has no weights there.
_ENCODER_SKELETON = 700 * _MB
_FLOAT = 4


@dataclass(frozen=True)
class Prediction:
    """Peak bytes of each stage; ``validation_in_pieces`` is the least that a validation takes, ``None``: no less."""

    graph: int
    weights: int
    validation: int
    calibration: int = 0
    validation_in_pieces: int | None = None
    ranges: int = 0

    @property
    def export(self) -> int:
        """Return the peak without validation: the skeleton's worker runs beside calibration and weights, not ranges."""
        return max(self.graph + max(self.weights, self.calibration), self.ranges)


def predict(plan: Plan, profile: Profile, threads: int) -> Prediction:
    """Predict the peak memory of an export's stages, in bytes."""
    rope = getattr(plan.structure, "rope_shape", None)
    # The skeleton's rotary tables exist as arrays, as protobuf fields and as the serialized file at once.
    rope_bytes = 2 * _FLOAT * rope[0] * rope[1] if rope is not None else 0
    # One thread more than quantize: the random-token pass reads rows just ahead of them.
    skeleton = _ENCODER_SKELETON if isinstance(plan.structure, Encoder) else _SKELETON
    weights = _MAIN + 2 * rope_bytes + (threads + 1) * max(_task_bytes(fate) for fate in plan.fates)
    weights += threads * _compensation_bytes(plan, profile)
    validating = room.needs(plan, profile)
    return Prediction(
        graph=skeleton + 4 * rope_bytes,
        weights=weights,
        validation=validating.whole,
        calibration=_calibration_bytes(plan, profile, threads),
        validation_in_pieces=validating.in_pieces,
        ranges=_ranges_bytes(plan, profile),
    )


def _ranges_bytes(plan: Plan, profile: Profile) -> int:
    """The ranges of activations are seen in a session of the whole: mapped, packed, and integer weights as float32.

    ONNX Runtime computes what it can while it loads, and a weight's DequantizeLinear is that. Two blocks of 48 million
    weights in 8 bits: 0.66 GB measured in the worker, 0.71 GB predicted.
    """
    if profile.quantize.activation_bits is None:
        return 0
    widened = [fate for fate in plan.fates if fate.scheme is not None and fate.scheme.activations != "none"]
    return _MAIN + room.RUNTIME + 2 * plan.data_bytes + _FLOAT * sum(fate.rows * fate.columns for fate in widened)


def _compensation_bytes(plan: Plan, profile: Profile) -> int:
    """GPTQ holds a linear's second moments a few times over in float64: as read, damped, inverted, factored."""
    from compress.calibrate.encoder import wanted

    if profile.quantize.quantizer != "gptq" or not wanted(plan, profile):
        return 0
    return int(max(linear.in_features**2 for linear in plan.structure.linears) * 2 * _FLOAT * 4)


def _calibration_bytes(plan: Plan, profile: Profile, threads: int) -> int:
    """The worker holds an encoder's float32 weights, for a moment twice, and the moments of its linears' inputs.

    A decoder's holds one block; see :mod:`compress.calibrate.estimate`.
    """
    from compress.calibrate.encoder import wanted
    from compress.calibrate.estimate import estimate

    decoding = estimate(plan, profile, threads, rate=1.0)
    if decoding is not None:
        return _MAIN + decoding.nbytes

    if not wanted(plan, profile):
        return 0
    moments = sum(linear.in_features**2 for linear in plan.structure.linears)
    return _MAIN + room.REFERENCE + int(2.2 * _FLOAT * plan.weight_count) + _FLOAT * moments + 64 * _MB


def _task_bytes(fate: Fate) -> int:
    """Return what a worker thread holds for a task: source rows, their float32 copy, codes and scratch."""
    whole = (fate.kind == "matmul" and fate.scheme is None) or any(piece.whole for piece in fate.reads)
    size = fate.rows * fate.columns if whole else min(fate.rows * fate.columns, CHUNK_WEIGHTS)
    copies = 2.5 if any(piece.whole for piece in fate.reads) else 2.0
    return int(size * _FLOAT * copies) + 8 * _MB


def by_step(prediction: Prediction, packaging: int) -> Mapping[str, int]:
    """Return the peak bytes of what runs one after the other before anything is measured: making files, packaging them.

    ``packaging`` is what the target with the largest appetite takes.
    """
    return {"export": prediction.export, "packaging": _MAIN + packaging}


def check(plan: Plan, profile: Profile, options: ExportOptions, packaging: int = 0) -> Prediction:
    """Refuse before work starts when a stage is predicted to take more than ``options.max_memory``.

    ``packaging`` is what the target with the largest appetite takes, bytes.

    Raises:
        ResourceError: Which stage needs how much, and what would help.
    """
    prediction = predict(plan, profile, options.threads)
    if options.max_memory is None:
        return prediction
    for stage, needed in by_step(prediction, packaging).items():
        if needed > options.max_memory:
            hint = f"raise --max-memory to {format_size(needed)}"
            if stage == "packaging":
                hint += ", or leave a target out (compress profiles shows them)"
            raise ResourceError(
                f"{stage} would take {format_size(needed)}, more than --max-memory {format_size(options.max_memory)}",
                hint=hint,
            )
    if options.validate:
        way = room.choose(room.needs(plan, profile), options.max_memory)
        room.check_budget(way, profile, options.max_memory)
    return prediction


def check_chain(wish: Wish, options: ExportOptions) -> None:
    """Refuse before work starts what measuring the pruned decoder as a float graph cannot do within the cap.

    Raises:
        ResourceError: Building or validating that graph would take more than ``options.max_memory``.
    """
    recipe = load_profile("float")
    changed = recipe.model_copy(update={"validation": wish.profile.validation, "budget": Budget()})
    check(make_plan(wish.plan.structure, recipe, wish.checkpoint), changed, options)
