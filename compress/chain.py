"""What each step of source -> pruned -> quantized costs and gains, measured in the run that validates the artifact.

The pruned model is built once more as a float graph and validated as the artifact is, against the same source and the
same float graph of it; what quantization adds is the artifact's own measurement.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress import pipeline, pooling, temporary
from compress.contracts import Checkpoint, Decoder
from compress.package.staging import write_file
from compress.package.writer import require_space
from compress.planning import Plan, make_plan
from compress.profile import Profile, load_profile
from compress.progress import Stages
from compress.report import chain as report_chain
from compress.report import json as report_json
from compress.report.model import ChainStep, Pruning
from compress.validation import room
from compress.validation.on_provider import Terms
from compress.validation.run import Validation

#: Validates a graph's directory, given what both kinds of model share.
Validate = Callable[[Path, Mapping[str, Any]], Validation]


@dataclass(frozen=True)
class Smaller:
    """The pruned checkpoint, open, and what ``pruning.json`` says."""

    checkpoint: Checkpoint
    record: Mapping[str, Any]


def measure(
    smaller: Smaller,
    source_bytes: int,
    plan: Plan,
    profile: Profile,
    directory: Path,
    result: Validation,
    shared: Mapping[str, Any],
    validate: Validate,
) -> Pruning:
    """Measure the pruned model, write the picture of the chain, and return the report's entry.

    Args:
        smaller: What was quantized.
        source_bytes: Of the source's weights.
        plan: The artifact's.
        profile: Its profile.
        directory: The artifact's.
        result: Its validation.
        shared: What it was validated with.
        validate: Runs a validation.
    """
    chain = [report_chain.step("source", source_bytes, None, None, None)]
    quantizes = any(fate.scheme is not None for fate in plan.fates)
    measured = _pruned(smaller, profile, directory, shared, validate) if quantizes else result
    speed = measured.speed[0] if measured.speed else None
    chain.append(report_chain.step("pruned", plan.source_bytes, measured.drift, speed, chain[-1]))
    if quantizes:
        speed = result.speed[0] if result.speed else None
        chain.append(report_chain.step("quantized", result.artifact_bytes, result.drift, speed, chain[-1]))
    return finish(smaller.record, chain, directory)


def finish(record: Mapping[str, Any], chain: list[ChainStep], directory: Path) -> Pruning:
    """Write the picture and return the report's entry."""
    write_file(directory / report_chain.PICTURE_NAME, report_chain.chain_svg(chain))
    keys = ("before", "after", "layers", "algorithm", "depth", "recover")
    return Pruning.model_validate({**{key: record.get(key) for key in keys}, "chain": chain})


def again(directory: Path, name: str, record: Mapping[str, Any], result: Validation) -> Pruning | None:
    """Return the chain of an artifact that is validated again: what was measured of the pruned model stays."""
    path = directory / name
    found = report_json.read(path).pruning if path.is_file() else None
    if found is None:
        return None
    chain = list(found.chain)
    if len(chain) > 2:
        speed = result.speed[0] if result.speed else None
        chain[2] = report_chain.step("quantized", result.artifact_bytes, result.drift, speed, chain[1])
    return finish(record, chain, directory)


def _pruned(
    smaller: Smaller, profile: Profile, directory: Path, shared: Mapping[str, Any], validate: Validate
) -> Validation:
    recipe = load_profile("float")
    structure = pipeline.describe(smaller.checkpoint)
    plan = make_plan(structure, recipe, smaller.checkpoint)
    require_space(directory, plan.predicted_bytes)
    pool = pooling.resolve(structure, profile, smaller.checkpoint)
    place = temporary.make("pruned-float-")
    try:
        pipeline.build(smaller.checkpoint, plan, recipe, place, int(shared["threads"]), Stages(), pool=pool)
        changes: dict[str, Any] = {"budgets": {}, "providers": ("cpu",), "pytorch_baseline": False, "terms": Terms()}
        if isinstance(structure, Decoder):
            changes["sample_tokens"] = 0  # samples are the artifact's
            changes["way"] = room.choose(room.needs(plan, recipe, ("cpu",)), shared["memory_cap"])
        found = validate(place, {**shared, **changes, "progress": lambda stage, fraction: None})
        # Its stages are not the artifact's.
        return replace(found, stages=())
    finally:
        shutil.rmtree(place, ignore_errors=True)
