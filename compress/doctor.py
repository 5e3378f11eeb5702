"""What works on this machine: every provider asked to run a graph of two operators, in a worker of its own.

A provider counts as working when its session took both nodes and gave the right numbers: a package that is installed
but finds no device, hangs, crashes, or computes on the CPU instead, is told apart from one that works.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compress import providers
from compress.contracts import Evidence, StaticallyChecked
from compress.errors import CompressError, ProviderError
from compress.validation.protocol import Json, run_worker

TIMEOUT_SECONDS = 120.0
_WIDTH = 16
#: Providers may compute in float16, of sums of 16 products of about 1.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Diagnosis:
    """What a provider is good for here.

    Attributes:
        provider: Its name.
        works: Whether a session ran, on it alone, and gave the right numbers.
        evidence: What validation on it would prove.
        device: What it runs on, ``None`` where it does not.
        versions: Of Python, onnxruntime and numpy in its runtime.
        reason: Why it does not work.
        remedy: What would make it work.
    """

    provider: str
    works: bool
    evidence: Evidence
    device: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    reason: str | None = None
    remedy: str | None = None


def examine(name: str, timeout: float = TIMEOUT_SECONDS) -> Diagnosis:
    """Try one provider.

    Raises:
        UsageError: There is no such provider.
    """
    provider = providers.load(name)
    checked: Evidence = "static" if isinstance(provider, StaticallyChecked) else "none"
    try:
        runtime = provider.runtime()
        with tempfile.TemporaryDirectory(prefix="compress-doctor-") as place:
            model = Path(place) / "probe.onnx"
            inputs, expected = write_probe(model)
            request = {
                "model": str(model),
                "provider": provider.name,
                "threads": 1,
                "jobs": [{"kind": "probe", "inputs": inputs}],
            }
            answer = run_worker("worker", request, timeout=timeout, runtime=runtime)
        _check(provider.name, answer, expected)
    except CompressError as error:
        return Diagnosis(provider.name, False, checked, reason=error.what, remedy=error.hint)
    return Diagnosis(provider.name, True, answer["evidence"], answer["device"], answer["versions"])


def examine_all(names: Sequence[str] = ()) -> list[Diagnosis]:
    """Try the providers called ``names``, all of them by default."""
    return [examine(name) for name in (names or providers.names())]


def document(found: Sequence[Diagnosis]) -> dict[str, Any]:
    """Return the diagnoses as JSON-able data."""
    return {"schema_version": 1, "providers": [asdict(item) for item in found]}


def text(found: Sequence[Diagnosis]) -> str:
    """Return the diagnoses as a table; below it, what would make the others work."""
    rows = [("provider", "evidence", "device", "versions")]
    for item in found:
        shown = ", ".join(f"{name} {version}" for name, version in item.versions.items() if name != "numpy")
        rows.append((item.provider, item.evidence, item.device or f"none: {item.reason}", shown))
    widths = [max(len(row[column]) for row in rows if row[3] or column < 2) for column in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    ]
    remedies = [f"{item.provider}: {item.remedy}" for item in found if not item.works and item.remedy]
    return "\n".join(lines + ([""] if remedies else []) + remedies) + "\n"


def write_probe(path: Path) -> tuple[dict[str, list[list[float]]], np.typing.NDArray[np.float64]]:
    """Write a graph of a product and a sum, every shape a number; return inputs and what has to come out."""
    import onnx_ir as ir

    def value(name: str, rows: int) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([rows, _WIDTH]))

    generator = np.random.default_rng(7)
    weight = generator.standard_normal((_WIDTH, _WIDTH)).astype(np.float32)
    given = generator.standard_normal((2, _WIDTH)).astype(np.float32)
    x, table = value("x", 2), value("weight", _WIDTH)
    table.const_value = ir.tensor(weight, name="weight")
    product = ir.Node("", "MatMul", [x, table], name="product")
    total = ir.Node("", "Add", [product.outputs[0], x], name="sum")
    y = total.outputs[0]
    y.name, y.type, y.shape = "y", x.type, ir.Shape([2, _WIDTH])
    product.outputs[0].name = "p"
    graph = ir.Graph([x], [y], nodes=[product, total], initializers=[table], opset_imports={"": 17}, name="probe")
    ir.save(ir.Model(graph, ir_version=8), path)
    return {"x": given.tolist()}, given.astype(np.float64) @ weight.astype(np.float64) + given


def _check(name: str, answer: Json, expected: np.typing.NDArray[np.float64]) -> None:
    """Refuse an answer that is wrong, or right but computed elsewhere.

    Raises:
        ProviderError: Which of the two.
    """
    placed = answer["placement"]
    if placed["fallback_nodes"] or not placed["nodes_on_provider"]:
        nodes = ", ".join(placed["fallback_nodes"])
        raise ProviderError(f"the {name} provider left a product and a sum to another one: {nodes}")
    found = np.asarray(answer["results"][0]["outputs"]["y"], np.float64)
    if found.shape != expected.shape or not np.allclose(found, expected, atol=_TOLERANCE, rtol=_TOLERANCE):
        raise ProviderError(f"the {name} provider computes a product and a sum wrongly", hint="update its driver")
