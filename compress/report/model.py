"""The report: ``report.json``, schema version 2. Unknown keys are errors, and no number is infinite or NaN.

A field that is ``None`` was not measured. Times are seconds, sizes bytes, divergences nats, shares 0..1.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

SCHEMA_VERSION = 2

Evidence = Literal["measured", "simulated", "emulated", "static", "none"]


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


class Histogram(_Strict):
    """How a measure is spread: ``counts[i]`` values lie in ``[edges[i], edges[i + 1])``, edges rising, the ends open.

    ``kl``: nats a token (of an encoder's labels: an item); ``cosine_distance``: 1 - cosine of a text's two embeddings.
    """

    measure: Literal["kl", "cosine_distance"]
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @model_validator(mode="after")
    def _one_edge_more_than_counts(self) -> Histogram:
        if len(self.edges) != len(self.counts) + 1 or any(a >= b for a, b in itertools.pairwise(self.edges)):
            raise ValueError("edges must rise, one more than there are counts")
        return self


class DecodeConsistency(_Strict):
    """Positions decoded one by one through the cache: against the source, and against the artifact's own prefill."""

    tokens: int
    kl_mean: float
    prefill_kl_mean: float
    self_kl_mean: float
    self_kl_max: float


class Positions(_Strict):
    """The file beside the report that holds a decoder's losses position by position: what ``compress compare`` pairs.

    ``sha256`` is the file's, ``windows_sha256`` that of the token ids of the text: only the same ids can be paired.
    """

    file: Literal["drift.npz"] = "drift.npz"
    sha256: str
    windows_sha256: str


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
    distribution: Histogram | None = None
    positions: Positions | None = None


class Cosine(_Strict):
    """Cosine of the two embeddings of a text: the mean with its standard error, and the worst text's."""

    mean: float
    min: float
    standard_error: float | None


class Flips(_Strict):
    """Examples whose answer changed; ``changed`` counts wrong answers that became another wrong answer too."""

    right_to_wrong: int
    wrong_to_right: int
    changed: int


class TaskAccuracy(_Strict):
    """How well both sides do on the user's labels; ``difference`` is artifact minus reference.

    ``metric``: ``accuracy``; ``neighbour_accuracy``, the share of texts whose nearest other text has their label;
    ``spearman``, the rank correlation with the given scores (it has no flips). ``interval`` is the difference's paired
    95 % interval. ``truncated`` texts were longer than ``max_length`` tokens.
    """

    labels: EvaluationText
    metric: Literal["accuracy", "neighbour_accuracy", "spearman"]
    examples: int
    truncated: int
    max_length: int
    reference: float
    artifact: float
    difference: float
    interval: tuple[float, float]
    interval_method: str
    flips: Flips | None


class EncoderDrift(_Strict):
    """What an encoder lost on texts, on the provider it names; what its task does not have is ``None``.

    ``items`` are what is compared: texts, tokens or masked positions (``unit`` says which). ``max_length`` is where
    texts were cut, in tokens, ``batch`` how many were padded together.
    """

    provider: str
    task: str
    texts: int
    tokens: int
    items: int
    unit: Literal["texts", "tokens", "masked positions"]
    max_length: int
    batch: int
    eval_text: EvaluationText
    reference: str
    cosine: Cosine | None = None
    neighbour_agreement: float | None = None
    neighbour_agreement_error: float | None = None
    label_agreement: float | None = None
    label_agreement_error: float | None = None
    kl_divergence: Divergence | None = None
    logit_max_abs: float | None = None
    task_accuracy: TaskAccuracy | None = None
    distribution: Histogram | None = None


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
    evidence: Evidence
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


class Latency(_Strict):
    """Milliseconds a run: the median and the slow twentieth."""

    p50: float
    p95: float


class Point(_Strict):
    """Runs of ``batch`` sequences of ``length`` tokens each; rates are at the median."""

    batch: int
    length: int
    runs: int
    latency_ms: Latency
    sequences_per_second: float
    tokens_per_second: float


class MeasuredPoint(Point):
    """A point of the artifact, with the ratios of the baselines' medians to its own."""

    speedup_vs_pytorch: float | None = None
    speedup_vs_onnx_float: float | None = None


class EncoderBaseline(_Strict):
    """The same work done by something else in the same run, or why it was not."""

    skipped: str | None = None
    load_seconds: float | None = None
    peak_rss_bytes: int | None = None
    points: tuple[Point, ...] = ()


class EncoderSpeed(_Strict):
    """How fast an encoder is. ``latency_ms`` and both speedups are the main point's: ``batch`` x ``length`` tokens."""

    provider: str
    device: str
    evidence: Evidence
    threads: int
    repeats: int
    load_seconds: float
    peak_rss_bytes: int
    batch: int
    length: int
    latency_ms: Latency
    points: tuple[MeasuredPoint, ...]
    baselines: dict[Literal["pytorch", "onnx_float"], EncoderBaseline] = Field(default_factory=dict)
    speedup_vs_pytorch: float | None = None
    speedup_vs_onnx_float: float | None = None


class Placement(_Strict):
    """Which nodes the provider took."""

    provider: str
    nodes_total: int
    nodes_on_provider: int
    fallback_nodes: tuple[str, ...] = ()


class AllocationBudget(_Strict):
    """What the bits were chosen to keep; ``None`` was no limit."""

    max_bytes: float | None = None
    max_kl: float | None = None


class FrontierPoint(_Strict):
    """An assignment that none of fewer bytes beats.

    ``relative_decode_time`` is predicted, beside the chosen assignment's: products with weights alone, from a table of
    kernels' times.
    """

    bytes: int
    predicted_kl: float
    relative_decode_time: float


class AllocatedTensor(_Strict):
    """How a tensor is stored; ``predicted_kl`` is what the model loses by it alone, measured before it was chosen."""

    name: str
    role: str
    storage: str
    bytes: int
    predicted_kl: float
    why: str


class Allocation(_Strict):
    """Bits chosen tensor by tensor under a budget.

    ``predicted_kl`` is the sum of the tensors', ``measured_kl`` the artifact's, in nats a token. ``bytes`` are graph
    and weights. At most the share ``gap`` of the objective could have been saved by a better search.
    """

    budget: AllocationBudget
    bytes: int
    predicted_kl: float
    measured_kl: float | None = None
    gap: float
    frontier: tuple[FrontierPoint, ...]
    tensors: tuple[AllocatedTensor, ...]


class TensorRecord(_Strict):
    """How a weight is stored, and how far it is from the source's.

    ``bits`` a weight, scales and zero points included. ``relative_error``: the Frobenius norm of the difference over
    that of the source's weight (which pruning and exact rescaling have changed already), ``None`` where it was not
    measured. ``layer`` is ``None`` outside the blocks.
    """

    name: str
    role: str
    layer: int | None = None
    storage: str
    bits: Annotated[float, Field(ge=0, le=1e6)]
    bytes: Annotated[int, Field(ge=0)]
    relative_error: float | None = None


class Sample(_Strict):
    """What source and artifact write after the same prompt, greedily, ``tokens`` new tokens at most.

    ``first_difference`` is the index of the first new token that differs, ``None`` where all are the same.
    ``source_complete`` is false where the source was only asked for its next token behind the artifact's text: then
    ``source`` ends with the first token that differs.
    """

    prompt: str
    chat: bool
    source: str
    artifact: str
    tokens: int
    first_difference: int | None
    source_complete: bool


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


def _kind(key: str, value: object) -> str:
    """Tell an encoder's measure, which has ``key``, from a decoder's."""
    return "encoder" if (key in value if isinstance(value, Mapping) else hasattr(value, key)) else "decoder"


# Neither kind says in a key which one it is: decoders' reports are older than encoders'.
AnyDrift = Annotated[
    Annotated[DecoderDrift, Tag("decoder")] | Annotated[EncoderDrift, Tag("encoder")],
    Discriminator(lambda value: _kind("task", value)),
]


class ProviderVerdict(_Strict):
    """One provider's share of the proof.

    ``state``: ``ran``; ``fell_back`` (nodes that the profile does not allow ran elsewhere); ``failed`` (the provider
    refused the graph, crashed or hung); ``checked`` (only the operators were looked up). ``drift`` is against the
    source, ``drift_from_cpu`` against the same artifact on the CPU provider, ``None`` with the reason in
    ``not_measured``.
    """

    provider: str
    device: str | None
    evidence: Evidence
    state: Literal["ran", "fell_back", "failed", "checked"]
    verdict: Verdict
    placement: Placement | None = None
    drift: AnyDrift | None = None
    drift_from_cpu: AnyDrift | None = None
    not_measured: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)


AnySpeed = Annotated[
    Annotated[Speed, Tag("decoder")] | Annotated[EncoderSpeed, Tag("encoder")],
    Discriminator(lambda value: _kind("points", value)),
]


class ChainStep(_Strict):
    """A step of source -> pruned -> quantized.

    ``bytes``: of the source's weights, the pruned checkpoint's, the artifact. ``size_factor`` and ``speed_factor``: how
    much smaller and faster than the step before. ``speedup_vs_source``: beside the source's float ONNX graph in the
    same run. ``drift``: from the source.
    """

    step: Literal["source", "pruned", "quantized"]
    bytes: int
    size_factor: float | None = None
    speedup_vs_source: float | None = None
    speed_factor: float | None = None
    drift: AnyDrift | None = None


class Pruning(_Strict):
    """What was removed before quantization: sizes before and after, the blocks that stayed, how, and the chain."""

    before: dict[str, int]
    after: dict[str, int]
    layers: tuple[int, ...]
    algorithm: str
    depth: str | None = None
    recover: str
    chain: tuple[ChainStep, ...] = ()


#: Share of the evaluation text that chance, quotations and boilerplate account for.
HARMLESS_OVERLAP = 0.01


class Calibration(_Strict):
    """What the model was calibrated on.

    ``sha256`` is the text's, or that of the token ids which the model wrote from ``seed`` (``source = "self"``).
    ``tokens`` in windows of ``window``; ``None`` where single sentences were used. ``overlap`` is the share of the
    evaluation text that occurs in this one (:mod:`compress.validation.overlap`), ``None`` where there is none to
    compare.
    """

    source: Literal["text", "self"]
    name: str
    sha256: str
    tokens: int | None = Field(default=None, ge=0)
    window: int | None = Field(default=None, ge=1)
    seed: int | None = None
    overlap: float | None = Field(default=None, ge=0, le=1)

    def warning(self) -> str | None:
        """Return what a reader of the drift must know, ``None`` where the texts have next to nothing in common."""
        if self.overlap is None or self.overlap <= HARMLESS_OVERLAP:
            return None
        return (
            f"{self.overlap:.1%} of the evaluation text is in the calibration text: "
            "drift is measured on text the model was calibrated on; it may be larger on other texts"
        )


class Report(_Strict):
    """All of it. ``fusions`` counts how often each rewrite rule fired in the graph.

    ``created`` is when it was made, ISO 8601 in UTC (``SOURCE_DATE_EPOCH``, where that is set).
    """

    schema_version: Literal[2] = 2
    created: str | None = None
    verdict: Verdict
    source: Source | None = None
    profile: ProfileSummary | None = None
    size: Size
    drift: AnyDrift | None = None
    speed: tuple[AnySpeed, ...] = ()
    placement: tuple[Placement, ...] = ()
    providers: tuple[ProviderVerdict, ...] = ()
    fusions: dict[str, int] = Field(default_factory=dict)
    allocation: Allocation | None = None
    calibration: Calibration | None = None
    pruning: Pruning | None = None
    tensors: tuple[TensorRecord, ...] = ()
    samples: tuple[Sample, ...] = ()
    stages: tuple[Stage, ...] = ()
    environment: Environment

    @property
    def passed(self) -> bool:
        """Return whether the verdict is ``pass``."""
        return self.verdict.status == "pass"
