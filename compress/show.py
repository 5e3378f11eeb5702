"""Plans, models and speeds as a person reads them, and as JSON: documents first, text made from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from compress import resources
from compress.calibrate.estimate import estimate
from compress.catalog import CatalogEntry
from compress.contracts import Checkpoint, Encoder
from compress.plan_document import PredictedSpeed
from compress.planning import Fate, Plan
from compress.profile import Profile
from compress.quantize.scheme import scheme_name
from compress.report import allocation as allocated
from compress.report.model import Allocation
from compress.sizes import format_size
from compress.validation.artifact import DECODING

# ------------------------------------------------------------------------------------------------------------ plan


def plan_document(
    plan: Plan,
    profile: Profile,
    checkpoint: Checkpoint,
    threads: int,
    allocation: Allocation | None = None,
    speed: PredictedSpeed | None = None,
) -> dict[str, Any]:
    """Return the plan as JSON-able data; sizes in bytes.

    ``allocation`` is how the plan's bits were chosen, where they were (:func:`compress.report.allocation.summarize`).
    ``speed`` is what was predicted (:mod:`compress.forecast`).
    """
    prediction = resources.predict(plan, profile, threads)
    calibrating = estimate(plan, profile, threads)
    return {
        "schema_version": 1,
        "model": checkpoint.identifier,
        "model_type": plan.model_type,
        "task": plan.structure.task if isinstance(plan.structure, Encoder) else DECODING,
        "profile": profile.name,
        "parameters": plan.weight_count,
        "bits_per_weight": round(plan.bits_per_weight, 3),
        "source_bytes": plan.source_bytes,
        "predicted_bytes": plan.predicted_bytes,
        "cache_bytes_per_token": plan.cache_bytes,
        "predicted_peak_memory": {
            "graph": prediction.graph,
            "weights": prediction.weights,
            "calibration": prediction.calibration,
            "ranges": prediction.ranges,
            "export": prediction.export,
            "validation": prediction.validation,
            "validation_in_pieces": prediction.validation_in_pieces,
        },
        "predicted_calibration_seconds": None if calibrating is None else round(calibrating.seconds, 1),
        "tensors": [
            {
                "name": fate.name,
                "role": fate.role or "vector",
                "shape": [fate.rows, fate.columns] if fate.kind != "vector" else [fate.rows * fate.columns],
                "storage": _storage(fate),
                "algorithm": profile.quantize.quantizer if fate.scheme else None,
                "bytes": fate.nbytes,
            }
            for fate in plan.fates
        ],
        "allocation": None if allocation is None else allocation.model_dump(mode="json"),
        "predicted_speed": None if speed is None else speed.model_dump(mode="json"),
    }


def _storage(fate: Fate) -> str:
    if fate.scheme is not None:
        return scheme_name(fate.scheme)
    return "float16" if fate.stored[0].dtype == "float16" else "float32"


def plan_text(document: Mapping[str, Any]) -> str:
    """Return the plan as text, one line a role and storage."""
    groups: dict[tuple[str, str], list[int]] = {}
    for tensor in document["tensors"]:
        count = 1
        for size in tensor["shape"]:
            count *= size
        group = groups.setdefault((tensor["role"], tensor["storage"]), [0, 0, 0])
        for index, amount in enumerate((1, count, tensor["bytes"])):
            group[index] += amount
    lines = [f"{document['model']} ({document['model_type']}, {document['task']}) under {document['profile']}", ""]
    lines.append(f"{'role':<18}{'storage':<16}{'tensors':>8}{'parameters':>16}{'size':>12}")
    for (role, storage), (tensors, count, size) in groups.items():
        lines.append(f"{role:<18}{storage:<16}{tensors:>8}{count:>16,}{format_size(size):>12}")
    peak, cache = document["predicted_peak_memory"], document["cache_bytes_per_token"]
    ratio = document["source_bytes"] / document["predicted_bytes"]
    lines += [
        "",
        f"parameters        {document['parameters']:,}",
        f"bits a weight     {document['bits_per_weight']:.2f}",
        f"source            {format_size(document['source_bytes'])}",
        f"artifact          {format_size(document['predicted_bytes'])} ({ratio:.1f}x smaller)",
        *([] if cache is None else [f"key/value cache   {format_size(1024 * cache)} for 1,024 tokens"]),
        f"peak memory       {format_size(peak['export'])} to export, {format_size(peak['validation'])} to validate",
    ]
    least = peak["validation_in_pieces"]
    if least is not None and least < peak["validation"]:
        lines.append(f"{'':<18}{format_size(least)} to validate in pieces, without speed and samples")
    if document.get("predicted_calibration_seconds") is not None:
        seconds = document["predicted_calibration_seconds"]
        shown = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        lines.append(f"calibration       {shown} on this machine")
    if document.get("predicted_speed") is not None:
        lines += _speed_lines(PredictedSpeed.model_validate(document["predicted_speed"]))
    if document.get("allocation") is not None:
        lines += ["", *allocation_lines(Allocation.model_validate(document["allocation"]))]
    return "\n".join(lines) + "\n"


def _speed_lines(speed: PredictedSpeed) -> list[str]:
    lines = []
    for run in speed.runs:
        tokens = f"{run.batch} x {run.tokens} tokens"
        if run.run == "latency":
            lines.append(f"{run.run:<18}{run.ms:g} ms for {tokens}, {run.speedup:.2f}x float32 ONNX's speed")
            continue
        work = "after" if run.past else "on a prompt of"
        rate = f"{run.tokens_per_second:g} tokens/s {work} {run.past or run.tokens} tokens"
        lines.append(f"{run.run:<18}{rate}, {run.speedup:.2f}x float32 ONNX's {run.float_tokens_per_second:g}")
    threads = f"{speed.threads} thread{'s' * (speed.threads != 1)}"
    lines.append(f"{'':<18}predicted for this machine: {threads}, {speed.cpu}, onnxruntime {speed.onnxruntime}")
    return lines


def allocation_lines(allocation: Allocation) -> list[str]:
    """Return how bits were chosen: the budget, the predicted loss, and the frontier around it as a table."""
    budget, points = allocation.budget, allocated.spread(allocation)
    asked = [] if budget.max_bytes is None else [format_size(budget.max_bytes)]
    asked += [] if budget.max_kl is None else [f"KL {budget.max_kl:g}"]
    lines = [
        f"bits chosen for   {', '.join(asked) or 'no budget'}",
        f"predicted KL      {allocation.predicted_kl:.4g} nats a token (the sum over tensors, measured one by one)",
        "",
        f"{'frontier':>12}{'predicted KL':>14}{'decode time':>13}",
    ]
    shown = [(point.bytes, point.predicted_kl, point.relative_decode_time, "") for point in points]
    shown.append((allocation.bytes, allocation.predicted_kl, 1.0, "  chosen"))
    for size, loss, time, mark in sorted(shown):
        lines.append(f"{format_size(size):>12}{loss:>14.4g}{time:>12.2f}x{mark}")
    return lines


# ---------------------------------------------------------------------------------------------------------- models


def models_text(entries: Iterable[CatalogEntry]) -> str:
    """Return the catalog as text."""
    lines = [f"{'name':<20}{'parameters':>11}  {'licence':<12}{'task':<22}{'support':<11}hub id"]
    for entry in entries:
        lines.append(
            f"{entry.name:<20}{_millions(entry.parameters):>11}  {entry.licence:<12}{entry.task:<22}{entry.support:<11}"
            f"{entry.hub}"
        )
        if entry.aliases:
            lines.append(f"{'':<20}also: {', '.join(entry.aliases)}")
        if entry.note:
            lines.append(f"{'':<20}{entry.note}")
    return "\n".join(lines) + "\n"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


# ----------------------------------------------------------------------------------------------------------- bench


def bench_text(document: Mapping[str, Any]) -> str:
    """Return speeds as text, a line a provider."""
    lines = []
    for entry in document["speed"]:
        if "points" in entry:
            lines += _encoder_bench(entry)
            continue
        decode = entry["decode_tokens_per_second"]
        lines.append(
            f"{entry['provider']} ({entry['evidence']}, {entry['threads']} threads): "
            f"prefill {entry['prefill_tokens_per_second']:.0f} tok/s, "
            f"decode {decode['median']:.1f} tok/s (p10 {decode['p10']:.1f}, p90 {decode['p90']:.1f}), "
            f"load {entry['load_seconds']:.2f} s, peak {format_size(entry['peak_rss_bytes'])}"
        )
    return "\n".join(lines) + "\n"


def _encoder_bench(entry: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{entry['provider']} ({entry['evidence']}, {entry['threads']} threads): load {entry['load_seconds']:.2f} s, "
        f"peak {format_size(entry['peak_rss_bytes'])}"
    ]
    for point in entry["points"]:
        latency = point["latency_ms"]
        lines.append(
            f"  {point['batch']} x {point['length']:<4} p50 {latency['p50']:.2f} ms, p95 {latency['p95']:.2f} ms, "
            f"{point['sequences_per_second']:.0f} texts/s"
        )
    return lines


def pruning_text(record: Mapping[str, Any]) -> str:
    """Return what pruning did, for a person: sizes before and after, and what the fits made of each linear."""
    names = {"inner": "neurons", "heads": "heads", "kv_heads": "key-value heads", "layers": "blocks"}
    lines = [
        f"{label:<16} {record['before'][key]:>7,} -> {record['after'][key]:,}"
        for key, label in names.items()
        if record["before"][key] != record["after"][key]
    ]
    if record["after"]["layers"] < record["before"]["layers"]:
        gone = sorted(set(range(record["before"]["layers"])) - set(record["layers"]))
        lines.append(f"{'removed blocks':<16} {', '.join(map(str, gone))}")
    if record["errors"]:
        pairs = list(record["errors"].values())
        first, last = (sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
        lines.append(f"{'missed power':<16} {first:.1%} -> {last:.1%} by fitting, mean over {len(pairs)} linears")
    return "\n".join(lines) + "\n"
