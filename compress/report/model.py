"""The report: ``report.json``, schema version 1. Unknown keys are errors, and no number is infinite or NaN.

A field that is ``None`` was not measured. Times are seconds, sizes bytes, divergences nats, shares 0..1.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Verdict(_Strict):
    """``pass`` has no reasons; ``fail`` has at least one sentence."""

    status: Literal["pass", "fail"]
    reasons: tuple[str, ...] = ()


class Source(_Strict):
    """Where the weights came from, without local paths."""

    identifier: str
    kind: str
    revision: str | None = None
    adapter: str | None = None


class ProfileSummary(_Strict):
    """The profile by name, and all of it as resolved."""

    name: str
    resolved: dict[str, Any] = Field(default_factory=dict)


class Size(_Strict):
    """Weights in the source, graph and weights in the artifact; ``ratio`` is source over artifact."""

    source_bytes: int | None = None
    artifact_bytes: int
    ratio: float | None = None


class EvaluationText(_Strict):
    """What drift was measured on."""

    name: str
    sha256: str


class Estimate(_Strict):
    """A value and its standard error, which needs two windows or more."""

    value: float
    standard_error: float | None


class Divergence(_Strict):
    """KL(reference || artifact) a token: mean with its standard error, and the 99th percentile."""

    mean: float
    standard_error: float | None
    p99: float


class DecodeConsistency(_Strict):
    """Positions decoded one by one through the cache: against the source, and against the artifact's own prefill."""

    tokens: int
    kl_mean: float
    prefill_kl_mean: float
    self_kl_mean: float
    self_kl_max: float


class DecoderDrift(_Strict):
    """What a decoder lost on a text, on the provider it names."""

    provider: str
    tokens: int
    windows: int
    eval_text: EvaluationText
    reference: str
    reference_perplexity: float
    perplexity_ratio: Estimate
    kl_divergence: Divergence
    top1_agreement: float
    confident_tokens: int
    confident_flips: int
    logit_max_abs: float
    decode: DecodeConsistency | None = None


class Rate(_Strict):
    """Tokens a second: the median step, and the slow and fast tenths."""

    median: float
    p10: float
    p90: float


class Baseline(_Strict):
    """The same work done by something else in the same run, or why it was not."""

    skipped: str | None = None
    load_seconds: float | None = None
    peak_rss_bytes: int | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: Rate | None = None


class Speed(_Strict):
    """How fast an artifact is. Speedups are ratios of median decode rates, measured in alternation."""

    provider: str
    device: str
    evidence: Literal["measured", "simulated", "emulated", "static", "none"]
    threads: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    load_seconds: float
    peak_rss_bytes: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: Rate
    baselines: dict[Literal["pytorch", "onnx_float"], Baseline] = Field(default_factory=dict)
    speedup_vs_pytorch: float | None = None
    speedup_vs_onnx_float: float | None = None
    prefill_speedup_vs_pytorch: float | None = None
    prefill_speedup_vs_onnx_float: float | None = None


class Placement(_Strict):
    """Which nodes the provider took."""

    provider: str
    nodes_total: int
    nodes_on_provider: int
    fallback_nodes: tuple[str, ...] = ()


class Stage(_Strict):
    """A step of the run; the peak is the largest process that did it."""

    name: str
    seconds: float
    peak_rss_bytes: int | None = None


class Environment(_Strict):
    """What it ran on. ``versions`` has ``python``, ``compress`` and each library that is installed."""

    versions: dict[str, str]
    cpu: str
    cores: int
    instruction_sets: tuple[str, ...]
    os: str
    architecture: str
    memory_bytes: int | None = None


class Report(_Strict):
    """All of it."""

    schema_version: Literal[1] = 1
    verdict: Verdict
    source: Source | None = None
    profile: ProfileSummary | None = None
    size: Size
    drift: DecoderDrift | None = None
    speed: tuple[Speed, ...] = ()
    placement: tuple[Placement, ...] = ()
    stages: tuple[Stage, ...] = ()
    environment: Environment
