"""Every file in compress/providers keeps the Provider contract; a new one is tested without an edit here."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import onnx_ir as ir
import pytest

from compress import providers
from compress.contracts import Evidence, Scheme
from compress.errors import ProviderError, UsageError
from compress.validation.worker import placement


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of one addition, float32 ``[2]``."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    node = ir.Node("", "Add", [x, x], name="twice", version=17)
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([2])
    graph = ir.Graph([x], [y], nodes=[node], opset_imports={"": 17}, name="g")
    path = tmp_path_factory.mktemp("provider") / "model.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def usable(name: str) -> None:
    works, reason = providers.load(name).available()
    if not works:
        pytest.skip(reason)


@pytest.mark.parametrize("name", providers.names())
class TestContract:
    """What any provider promises."""

    def test_it_is_found_by_its_name(self, name: str) -> None:
        assert providers.load(name).name == name.replace("_", "-")
        assert providers.load(name).onnxruntime_name.endswith("ExecutionProvider")

    def test_availability_comes_with_a_reason(self, name: str) -> None:
        works, reason = providers.load(name).available()
        assert isinstance(works, bool) and reason.strip()

    def test_evidence_is_one_of_the_known_kinds(self, name: str) -> None:
        assert providers.load(name).evidence() in get_args(Evidence)

    def test_a_session_runs_and_places_every_node_on_it(self, name: str, model: Path) -> None:
        usable(name)
        provider = providers.load(name)
        session = provider.session(model, {"log_severity_level": "3"}, 1)
        # A provider may compute in float16.
        np.testing.assert_allclose(session.run(None, {"x": np.array([1, 2], np.float32)})[0], [2, 4], rtol=1e-3)
        placed = placement(session, provider)
        assert placed["nodes_total"] == placed["nodes_on_provider"] >= 1 and placed["fallback_nodes"] == []

    def test_threads_are_what_was_asked_for(self, name: str, model: Path) -> None:
        usable(name)
        options = providers.load(name).session(model, {"intra_op_num_threads": "7"}, 2).get_session_options()
        assert options.intra_op_num_threads == 2

    def test_config_entries_arrive(self, name: str, model: Path) -> None:
        usable(name)
        key = "optimization.constant_folding_max_output_size_in_bytes"
        options = providers.load(name).session(model, {key: "1024"}, 1).get_session_options()
        assert options.get_session_config_entry(key) == "1024"

    @pytest.mark.parametrize("options", [{"no_such_option": "1"}, {"log_severity_level": "loud"}])
    def test_a_wrong_option_is_an_error(self, name: str, model: Path, options: dict[str, str]) -> None:
        usable(name)
        with pytest.raises(UsageError, match="session option"):
            providers.load(name).session(model, options, 1)

    def test_a_damaged_model_is_a_provider_error(self, name: str, tmp_path: Path) -> None:
        usable(name)
        (tmp_path / "model.onnx").write_bytes(b"not a model")
        with pytest.raises(ProviderError, match="cannot load"):
            providers.load(name).session(tmp_path / "model.onnx", {}, 1)

    def test_floats_are_among_what_its_cache_may_be(self, name: str) -> None:
        provider = providers.load(name)
        assert provider.supports_cache("float") is None
        reason = provider.supports_cache("int8")
        assert reason is None or "int8" in reason

    def test_an_impossible_scheme_is_refused_with_a_reason(self, name: str) -> None:
        assert providers.load(name).supports(Scheme(bits=4, block_size=512, symmetric=True))
        assert providers.load(name).supports(Scheme(bits=5, block_size=32, symmetric=True))

    def test_placement_reports_a_node_elsewhere(self, name: str) -> None:
        provider = providers.load(name)
        placed = placement(FakeSession([("OtherExecutionProvider", 2), (provider.onnxruntime_name, 3)]), provider)
        assert (placed["nodes_total"], placed["nodes_on_provider"]) == (5, 3)
        assert placed["fallback_nodes"] == [f"n{index} (MatMul) on OtherExecutionProvider" for index in range(2)]


class FakeNode:
    """A node as onnxruntime's assignment lists it."""

    def __init__(self, name: str) -> None:
        self.name, self.op_type = name, "MatMul"


class FakeSubgraph:
    """A subgraph given to one provider."""

    def __init__(self, ep_name: str, count: int) -> None:
        self.ep_name, self._count = ep_name, count

    def get_nodes(self) -> list[FakeNode]:
        """Return its nodes."""
        return [FakeNode(f"n{index}") for index in range(self._count)]


class FakeSession:
    """A session that only knows its placement."""

    def __init__(self, parts: list[tuple[str, int]]) -> None:
        self._parts = [FakeSubgraph(*part) for part in parts]

    def get_provider_graph_assignment_info(self) -> list[FakeSubgraph]:
        """Return the placement."""
        return self._parts


def test_an_unknown_provider_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="unknown provider 'cpuu'") as caught:
        providers.load("cpuu")
    assert caught.value.hint is not None and caught.value.hint.startswith("did you mean cpu")


def test_cpu_knows_the_slow_two_bit_blocks() -> None:
    cpu = providers.load("cpu")
    assert cpu.supports(Scheme(2, 16, True)) and cpu.supports(Scheme(2, 32, True)) is None
    assert all(cpu.supports(Scheme(bits, 32, False)) is None for bits in (2, 4, 8))
