"""The CUDA profiles: their graphs are checked anywhere, and run where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from compress import doctor, pipeline, providers, validation
from compress.contracts import Scheme
from compress.errors import EXIT_PROVIDER, ProviderError
from compress.profile import Profile, load_profile
from compress.progress import Stages
from compress.providers import cuda
from compress.validation.on_provider import Terms
from compress.validation.speed import SpeedPlan
from tiny_models import FAMILIES


@pytest.fixture(scope="module", params=["cuda-int4", "cuda-fp16"])
def profile(request: pytest.FixtureRequest) -> Profile:
    return load_profile(request.param)


@pytest.fixture(scope="module")
def artifact(tiny_artifact: Callable[..., Path], profile: Profile) -> Path:
    """The tiny Llama under a profile, not validated."""
    return tiny_artifact("llama", profile.name)


def test_the_graph_passes_the_checker(artifact: Path, profile: Profile) -> None:
    onnx.checker.check_model(str(artifact / "model.onnx"))
    graph = onnx.load(artifact / "model.onnx", load_external_data=False).graph
    products = {node.op_type for node in graph.node if node.op_type.startswith("MatMul")}
    assert products == {"MatMulNBits" if profile.name == "cuda-int4" else "MatMul"}
    # CUDA's grouped-query attention takes float16 and bfloat16.
    cache = next(value for value in graph.input if value.name == "past_key_values.0.key")
    assert cache.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_every_scheme_has_a_kernel() -> None:
    profile = load_profile("cuda-int4")
    provider = providers.load("cuda")
    for role in ("qkv", "attention_output", "gate_up", "down", "head"):
        scheme = profile.quantize.scheme(role)  # type: ignore[arg-type]
        assert scheme is not None and provider.supports(scheme) is None
    assert provider.supports(Scheme(2, 32, True)) is not None


@pytest.mark.parametrize("name", ["llama", "phi3-longrope"])
def test_lengths_may_fall_back_and_nothing_heavy(
    name: str, tiny_artifact: Callable[..., Path], profile: Profile
) -> None:
    """ONNX Runtime computes on the CPU what comes of shapes alone; what has a weight or a cache has to stay."""
    graph = onnx.load(tiny_artifact(name, profile.name) / "model.onnx", load_external_data=False).graph
    allowed = set(profile.validation.allowed_fallback)
    constants = {item.name for item in graph.initializer}
    lengths: set[str] = set()
    light = set()
    for node in graph.node:
        if node.op_type == "Shape" or (set(node.input) & lengths and set(node.input) <= lengths | constants):
            lengths |= set(node.output)
            light.add(node.op_type)
    weights = {item.name for item in graph.initializer if item.data_type == onnx.TensorProto.FLOAT16}
    heavy = {node.op_type for node in graph.node if weights & set(node.input) or node.op_type == "GroupQueryAttention"}
    assert {"Shape", "Gather", "Cast"} <= light and len(heavy) >= 3
    assert light - {"Range"} <= allowed  # CUDA's Range reads its bounds from the host, and stays
    assert heavy & allowed <= {"Gather"}  # the table of cuda-fp16 is gathered from


def test_without_a_gpu_an_export_that_would_be_measured_is_refused_before_work(
    tiny_model: Callable[[str], Path], profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "missing_gpu", lambda: "there is no NVIDIA driver on this machine")
    with pytest.raises(ProviderError, match="cuda provider does not work here: there is no NVIDIA driver") as caught:
        model = pipeline.ModelReference(str(tiny_model("llama")))
        pipeline.export(model, profile, tmp_path / "out", pipeline.ExportOptions(), Stages())
    assert caught.value.exit_code == EXIT_PROVIDER and not (tmp_path / "out").exists()
    assert caught.value.hint is not None and "compress doctor --install cuda, or --no-validate" in caught.value.hint


def test_a_driver_without_a_device_is_told_from_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def __init__(self, failure: int, devices: int) -> None:
            self.failure, self.devices = failure, devices

        def cuInit(self, flags: int) -> int:
            return self.failure

        def cuDeviceGetCount(self, count: object) -> int:
            count._obj.value = self.devices  # type: ignore[attr-defined]
            return 0

    for failure, devices, words in ((0, 1, None), (0, 0, "sees no GPU"), (100, 0, "sees no GPU")):
        monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name, f=failure, d=devices: Driver(f, d))
        found = cuda.missing_gpu()
        assert found is None if words is None else found is not None and words in found


@pytest.mark.providers
@pytest.mark.parametrize("name", FAMILIES)
def test_it_runs_on_a_gpu(
    name: str, tiny_artifact: Callable[..., Path], tiny_model: Callable[[str], Path], profile: Profile
) -> None:
    found = doctor.examine("cuda")
    if not found.works:
        pytest.skip(f"cuda: {found.reason}")
    result = validation.run_validation(
        tiny_artifact(name, profile.name),
        checkpoint_spec=validation.CheckpointSpec(str(tiny_model(name))),
        budgets={},
        providers=("cuda",),
        tokens=96,
        window=48,  # past the sliding window, and past LongRoPE's switch
        pytorch_baseline=False,
        speed_plan=SpeedPlan(8, 3, 1, timeout=300),
        terms=Terms(allowed_fallback=profile.validation.allowed_fallback),
    )
    (verdict,) = result.providers
    assert verdict.placement is not None
    assert verdict.state == "ran", verdict.placement.fallback_nodes
    assert verdict.drift_from_cpu is not None
    assert verdict.drift_from_cpu.kl_divergence.mean < 1e-3  # type: ignore[union-attr]
