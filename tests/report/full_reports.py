"""Reports with every field filled: a decoder's and an encoder's. Their numbers are made up."""

from __future__ import annotations

import math
from typing import Any

from test_report import ACCURACY, CLASSIFIER, EMBEDDING, ENCODER, REPORT

from compress.profile import load_profile

LAYERS = 12
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def tensors() -> list[dict[str, Any]]:
    """Return weights of 12 layers: mostly 4 bits, the first and last layers' ``down`` in 8, a table outside."""
    found: list[dict[str, Any]] = [
        {
            "name": "model.embed_tokens",
            "role": "embedding",
            "layer": None,
            "storage": "int4 b16 asym",
            "bits": 4.875,
            "bytes": 17_000_000,
            "relative_error": 0.0712,
        }
    ]
    for layer in range(LAYERS):
        for index, role in enumerate(ROLES):
            fine = role == "down" and layer in (0, LAYERS - 1)
            error = 0.0061 if fine else 0.075 + 0.004 * index + 0.006 * math.sin(layer + index)
            found.append(
                {
                    "name": f"model.layers.{layer}.{role}_proj",
                    "role": role,
                    "layer": layer,
                    "storage": "int8 b32 sym" if fine else "int4 b32 sym",
                    "bits": 8.25 if fine else 4.25,
                    "bytes": 900_000 if fine else 450_000,
                    "relative_error": None if (role, layer) == ("k", 3) else error,
                }
            )
    return found


def distribution(measure: str, low: float, high: float, total: int) -> dict[str, Any]:
    """Return 24 columns, equally wide by their logarithms, of a bell."""
    edges = [low * (high / low) ** (index / 24) for index in range(25)]
    weights = [math.exp(-(((index - 15) / 4) ** 2)) for index in range(24)]
    counts = [int(total * weight / sum(weights)) for weight in weights]
    counts[15] += total - sum(counts)
    return {"measure": measure, "edges": edges, "counts": counts}


SAMPLES: list[dict[str, Any]] = [
    {
        "prompt": "What is a lighthouse for?",
        "chat": True,
        "source": "A lighthouse warns ships of rocks and shows them the way into a harbour.",
        "artifact": "A lighthouse warns ships of rocks and helps sailors to find a harbour at night.",
        "tokens": 32,
        "first_difference": 9,
        "source_complete": True,
    },
    {
        "prompt": "def mean(values):\n",
        "chat": False,
        "source": "    return sum(values) / len",
        "artifact": "    return sum(values) / float(len(values))",
        "tokens": 32,
        "first_difference": 6,
        "source_complete": False,
    },
    {
        "prompt": "Name three primary colours.",
        "chat": True,
        "source": "Red, yellow and blue.",
        "artifact": "Red, yellow and blue.",
        "tokens": 32,
        "first_difference": None,
        "source_complete": True,
    },
]

PRUNING: dict[str, Any] = {
    "before": {"layers": 14, "intermediate_size": 1536},
    "after": {"layers": 12, "intermediate_size": 1280},
    "layers": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13],
    "algorithm": "wanda",
    "depth": "block-influence",
    "recover": "refit",
    "chain": [
        {"step": "source", "bytes": 540_000_000, "speedup_vs_source": 1.0},
        {
            "step": "pruned",
            "bytes": 430_000_000,
            "size_factor": 1.2558,
            "speedup_vs_source": 1.1875,
            "speed_factor": 1.1875,
            "drift": REPORT["drift"],
        },
        {
            "step": "quantized",
            "bytes": 86_500_000,
            "size_factor": 4.971,
            "speedup_vs_source": 3.147,
            "speed_factor": 2.65,
            "drift": REPORT["drift"],
        },
    ],
}

CHANGES = ("budget.min_speedup_vs_onnx_float=1.25", "budget.max_bytes=88MB", "quantize.block_size=64")


def resolved(name: str, *changes: str) -> dict[str, Any]:
    return load_profile(name, changes).model_dump(mode="json", exclude_none=True)


DECODER: dict[str, Any] = {
    **REPORT,
    "created": "2026-05-04T03:02:01Z",
    "source": {"identifier": "owner/model", "kind": "hub", "revision": "abc123", "adapter": "tuned"},
    "profile": {"name": "arm-int4", "resolved": resolved("arm-int4", *CHANGES)},
    "drift": {
        **REPORT["drift"],
        "kl_divergence": {"mean": 0.4125, "standard_error": 0.0104, "p99": 2.5},
        "distribution": distribution("kl", 1e-6, 16.0, 2044),
    },
    "providers": [
        {**REPORT["providers"][0], "drift": REPORT["drift"]},
        {
            "provider": "qnn",
            "device": "Hexagon HTP simulator",
            "evidence": "simulated",
            "state": "fell_back",
            "verdict": {"status": "fail", "reasons": ["2 nodes did not run on qnn, the first is /layers/0/Gelu"]},
            "placement": {
                "provider": "qnn",
                "nodes_total": 341,
                "nodes_on_provider": 339,
                "fallback_nodes": ["/layers/0/Gelu (Gelu) on CPU", "/layers/1/Gelu (Gelu) on CPU"],
            },
            "drift": None,
            "drift_from_cpu": {**REPORT["drift"], "provider": "qnn"},
            "not_measured": {"speed": "time is not measured where the run is simulated"},
            "versions": {"onnxruntime-qnn": "2.7.0"},
        },
    ],
    "tensors": tensors(),
    "samples": SAMPLES,
    "pruning": PRUNING,
}

ENCODER_FULL: dict[str, Any] = {
    **ENCODER,
    "created": "2026-05-04T03:02:01Z",
    "verdict": {"status": "pass", "reasons": []},
    "profile": {"name": "x86-int8", "resolved": resolved("x86-int8", "budget.min_neighbour_agreement=0.9")},
    "drift": {**EMBEDDING, "task_accuracy": ACCURACY, "distribution": distribution("cosine_distance", 1e-7, 1.0, 256)},
    "allocation": None,
    "calibration": {"source": "self", "name": "own words", "sha256": "4" * 64, "tokens": None, "seed": 7},
    "tensors": [{**item, "relative_error": None} for item in tensors()],
}

TAGGER: dict[str, Any] = {**ENCODER_FULL, "drift": CLASSIFIER, "calibration": None}

#: What a report must have, and nothing else.
MINIMAL: dict[str, Any] = {
    "schema_version": 2,
    "verdict": {"status": "pass", "reasons": []},
    "size": {"artifact_bytes": 1234},
    "environment": {
        "versions": {},
        "cpu": "",
        "cores": 1,
        "instruction_sets": [],
        "os": "",
        "architecture": "",
        "memory_bytes": None,
    },
}
