"""How fast an artifact will be on this machine beside float32 ONNX, before it exists.

Requires a structure and a profile; ensures numbers that :mod:`compress.latency` adds up from measured parts, and no
artifact that is known to be slower than float32 without a word of it. Only ``compress plan --speed`` measures parts: an
export uses what is known already, so that it takes no longer and no more memory, and its files stay the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from compress.contracts import Decoder, Structure
from compress.errors import UsageError
from compress.latency.geometry import Geometry, geometry_of, require_local
from compress.latency.model import LatencyModel, standard_workloads
from compress.latency.parts import Workload
from compress.plan_document import PredictedRun, PredictedSpeed
from compress.planning import Plan
from compress.profile import Profile, load_profile
from compress.report import slower
from compress.report.environment import environment
from compress.report.model import Report
from compress.rotation.structure import rotates

_log = logging.getLogger(__name__)


def check(profile: Profile) -> None:
    """Refuse to predict, before any work, what cannot be known.

    Raises:
        UsageError: The profile is not for this machine's processor; or the sizes that pruning leaves are searched, or
            depend on a text.
    """
    require_local(profile)
    if profile.prune.searches or profile.prune.vocabulary != "all":
        raise UsageError(
            "the speed of a model whose sizes pruning has yet to find cannot be predicted",
            where=f"profile {profile.name}",
            hint="compress prune MODEL -o DIR first, then plan DIR without prune.*",
        )


def predict(
    plan: Plan, source: Structure, profile: Profile, threads: int, progress: Callable[[float], None] = lambda part: None
) -> PredictedSpeed:
    """Measure what is not known of this machine, in a worker, and predict.

    Args:
        plan: The artifact's.
        source: The model that it is compared with, in float32.
        profile: The plan's.
        threads: Threads inside an operator.
        progress: Called with a fraction in 0..1 while parts are measured.

    Raises:
        UsageError: The profile's products are not for this machine's processor.
        WorkerError: The worker crashed or hung.
    """
    return _predicted(plan, source, profile, LatencyModel(threads, progress=progress))


def known(plan: Plan, source: Structure, profile: Profile, threads: int) -> PredictedSpeed | None:
    """Return the prediction where all that it needs has been measured before, else ``None``."""
    model = LatencyModel(threads)
    try:
        pair = _pair(plan, source, profile)
    except UsageError:
        return None
    workloads = _workloads(plan.structure)
    if not all(model.knows(geometry, workload) for geometry in pair for workload in workloads.values()):
        return None
    return _predicted(plan, source, profile, model)


def _predicted(plan: Plan, source: Structure, profile: Profile, model: LatencyModel) -> PredictedSpeed:
    pair, workloads = _pair(plan, source, profile), _workloads(plan.structure)
    for workload in workloads.values():
        model.prepare(pair, workload)
    here = environment()
    return PredictedSpeed(
        cpu=here.cpu,
        onnxruntime=here.versions.get("onnxruntime", ""),
        threads=model.threads,
        runs=tuple(_run(name, workload, pair, model) for name, workload in workloads.items()),
    )


def _run(name: str, workload: Workload, pair: tuple[Geometry, Geometry], model: LatencyModel) -> PredictedRun:
    own, other = (model.seconds(geometry, workload) for geometry in pair)
    tokens = workload.batch * workload.tokens
    return PredictedRun(
        run=name,
        batch=workload.batch,
        tokens=workload.tokens,
        past=workload.past,
        ms=_digits(1000 * own),
        float_ms=_digits(1000 * other),
        tokens_per_second=_digits(tokens / own),
        float_tokens_per_second=_digits(tokens / other),
        speedup=_digits(other / own),
    )


def _digits(value: float) -> float:
    """Return what a prediction is good for."""
    return float(f"{value:.3g}")


def _workloads(structure: Structure) -> Mapping[str, Workload]:
    """Return what is run, in the order of a user's wait: the prompt, then its answer."""
    return dict(reversed(list(standard_workloads(decoder=isinstance(structure, Decoder)).items())))


def _pair(plan: Plan, source: Structure, profile: Profile) -> tuple[Geometry, Geometry]:
    products = [fate for fate in plan.fates if fate.kind != "vector"]
    schemes = {fate.name: fate.scheme for fate in products if fate.scheme is not None}
    floats = [fate.name for fate in products if fate.kind == "matmul" and fate.scheme is None]
    own = geometry_of(plan.structure, profile, schemes=schemes, keep_float=floats)
    return own, geometry_of(source, load_profile("float"))


# ----------------------------------------------------------------------------------------------------------- warnings


def warn(plan: Plan, profile: Profile, speed: PredictedSpeed) -> None:
    """Say what is predicted to be slower than float32, if anything is."""
    compared = [slower.Compared(_told(run), run.speedup) for run in speed.runs]
    told = slower.sentence(compared) if _quantized(plan) else None
    if told is not None:
        threads = f"{speed.threads} thread{'s' * (speed.threads != 1)}"
        _log.warning("%s: %s (predicted for this machine, %s); %s", profile.name, told, threads, _remedy(plan, profile))


def warn_of_export(
    plan: Plan, source: Structure, profile: Profile, threads: int, report: Mapping[str, Any] | None
) -> None:
    """Say what is slower than float32: as measured, else as predicted from what is known, else that nobody knows."""
    if profile.provider != "cpu" or not _quantized(plan):
        return
    speeds = [] if report is None else Report.model_validate(report).speed
    own = [item for speed in speeds if speed.provider == profile.provider for item in slower.measured(speed)]
    if own:
        told = slower.sentence(own)
        if told is not None:
            _log.warning("%s: %s (measured); %s", profile.name, told, _remedy(plan, profile))
        return
    speed = known(plan, source, profile, threads)
    if speed is not None:
        warn(plan, profile, speed)
    elif _blocks(plan):
        _log.warning(
            "how fast this is beside float32 ONNX was not measured, and weights in blocks often read prompts more "
            "slowly: compress plan --speed predicts it for the same model and profile"
        )


def _told(run: PredictedRun) -> str:
    if run.run == "decode":
        return slower.DECODES
    return slower.prompt(run.tokens) if run.run == "prefill" else slower.text(run.batch, run.tokens)


def _quantized(plan: Plan) -> bool:
    return any(fate.scheme is not None for fate in plan.fates if fate.kind == "matmul")


def _blocks(plan: Plan) -> bool:
    """Return whether most products of the blocks multiply floats by weights that are unpacked on the way."""
    own = [fate.scheme for fate in plan.fates if fate.kind == "matmul" and fate.role != "head"]
    return 2 * sum(scheme is not None and scheme.activations == "none" for scheme in own) > len(own)


def _remedy(plan: Plan, profile: Profile) -> str:
    return slower.remedy(profile.name, blocks=_blocks(plan), rotates=rotates(plan.structure))
