"""Profiles: the whole recipe of an artifact as data, validated once and strictly.

A profile is a TOML file; unknown keys are errors that name the fix. ``--set quantize.block_size=64`` overrides one key
after the file was read, through the same schema.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compress.contracts import Activations, AttentionWay, CacheType, FloatType, Role, ScaleFormat, Scheme
from compress.errors import CompressError, UsageError, did_you_mean
from compress.sizes import parse_size

_MAX_PROFILE_BYTES = 256 * 1024
_MAX_DOTS = 200


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class SchemeOverride(_Strict):
    """What a role changes of the profile's scheme; an absent key keeps the profile's value, ``bits = 32`` is float."""

    bits: Literal[2, 4, 7, 8, 32] | None = None
    block_size: int | None = None
    symmetric: bool | None = None
    activations: Activations | None = None


#: Tables are looked up, not multiplied; a head's inputs decide every output.
_WEIGHT_ONLY: tuple[Role, ...] = ("embedding", "position", "head")


Effort = Literal["fast", "balanced", "max"]
_ALGORITHMS: Mapping[Effort, str] = {"fast": "rtn", "balanced": "gptq", "max": "gptq"}


class Quantize(_Strict):
    """How weights are stored. ``bits = 32`` means float32: no quantization at all.

    ``activations`` makes integer products of linears: their weights have one scale an output channel then, whatever
    ``block_size`` says. Embedding tables and the head keep their inputs in float32 unless their role says otherwise.
    Position tables stay float32 unless ``roles.position`` says otherwise. ``decoder_roles`` changes roles of models
    that write text, so that one profile serves both kinds. ``smoothing`` (encoders with integer
    products) tames outlier channels by what calibration texts show; see :mod:`compress.calibrate.smoothing`.
    ``rotation = "residual"`` (models that write text) spreads outlier channels over all channels by a change of basis
    that is folded into the weights; see :mod:`compress.rotation`.
    ``pair_safe`` keeps neighbouring weights of integer products so small that no processor's sums overflow; without it
    weights are rounded better, for processors that add four products in 32 bits (VNNI, AMX, ARM's dot products).
    ``effort`` is what the weights of models that write text may cost: ``fast`` needs no text and seconds, ``balanced``
    calibrates on one for minutes, ``max`` for hours; ``algorithm = "auto"`` is the one that goes with it.
    ``allocation = "budget"`` chooses bits and block sizes tensor by tensor, by what each one's errors were measured to
    cost, so that ``budget.max_bytes`` or ``budget.max_kl`` is kept; ``roles`` takes those of the profile.
    ``max_layer_loss`` keeps a linear in float32 that alone changes more than this share of the outputs' variance, as
    measured (:mod:`compress.calibrate.sensitivity`). ``input_range`` chooses the ranges of ``activations = "static"``.
    ``activation_bits`` makes integers of all tensors between nodes, not of the products' inputs alone: what NPUs run.
    It goes with ``activations = "static"`` and ``graph.static_length``.
    """

    effort: Effort = "fast"
    algorithm: str = "auto"
    allocation: Literal["roles", "budget"] = "roles"
    bits: Literal[2, 4, 7, 8, 32] = 4
    block_size: int = 32
    symmetric: bool = True
    activations: Activations = "none"
    activation_bits: Literal[8, 16] | None = None
    accuracy_level: Literal[0, 1, 4] = 4
    scale_format: ScaleFormat = "float32"
    importance: Literal["random-tokens", "none"] = "random-tokens"
    smoothing: Literal["calibrated", "none"] = "none"
    rotation: Literal["none", "residual"] = "none"
    pair_safe: bool = True
    max_layer_loss: float | None = Field(default=None, gt=0)
    input_range: Literal["percentile", "entropy", "minmax"] = "percentile"
    roles: dict[Role, SchemeOverride] = Field(default_factory=dict)
    decoder_roles: dict[Role, SchemeOverride] = Field(default_factory=dict)

    @property
    def quantizer(self) -> str:
        """Return the algorithm's name, ``auto`` resolved by the effort."""
        return _ALGORITHMS[self.effort] if self.algorithm == "auto" else self.algorithm

    def for_decoders(self) -> Quantize:
        """Return the same with ``decoder_roles`` laid over ``roles``, key by key."""
        merged = dict(self.roles)
        for role, change in self.decoder_roles.items():
            given = change.model_dump(exclude_none=True)
            merged[role] = merged.get(role, SchemeOverride()).model_copy(update=given)
        return self.model_copy(update={"roles": merged, "decoder_roles": {}})

    def scheme(self, role: Role) -> Scheme | None:
        """Return the scheme of a role, ``None`` where it stays float32."""
        change = self.roles.get(role, SchemeOverride())
        bits = self.bits if change.bits is None else change.bits
        if role in ("position", "rotation") and change.bits is None:
            return None
        if bits == 32:
            return None
        activations = change.activations or ("none" if role in _WEIGHT_ONLY else self.activations)
        block_size = self.block_size if change.block_size is None else change.block_size
        return Scheme(
            bits=bits,
            block_size=block_size if activations == "none" else 0,
            symmetric=(self.symmetric if change.symmetric is None else change.symmetric) or activations != "none",
            activations=activations,
            pair_safe=self.pair_safe or activations == "none",
        )


class Calibration(_Strict):
    """What models that write text are calibrated on: ``tokens`` of it, in windows of ``window``.

    ``source = "text"`` is ``--calibration-text``, else the Python language reference; ``"self"`` is text that the model
    writes itself, seeded: it needs the whole model in memory.
    """

    source: Literal["text", "self"] = "text"
    tokens: int = Field(default=8192, ge=64, le=1 << 24)
    window: int = Field(default=512, ge=8)


class Prune(_Strict):
    """What is removed before anything is quantized. An amount below 1 is a share, from 1 on a number of parts.

    ``ffn``: neurons of every feed-forward; ``heads``: query heads, equally many of every key-value group;
    ``kv_groups``: whole groups; ``layers``: blocks. ``vocabulary = "from-text"`` leaves the tokens that
    ``--calibration-text`` uses, with all that keeps the tokenizer complete. ``algorithm`` chooses neurons and heads
    (``auto``: surgeon), ``depth`` chooses blocks. ``recover``: ``refit`` fits what follows a cut again in closed form,
    ``distill`` trains on the original's outputs after that, ``none`` does neither. ``tokens`` of the text are read for
    choosing and fitting: by default ``calibration.tokens``, of encoders more. ``sparsity`` zeroes single weights
    by ``sparsifier``, a share of each linear or, with ``pattern = "2:4"``, two of every four: for other runtimes, ONNX
    Runtime is no faster for it.

    ``speedup`` and ``max_kl`` search the amounts instead: the least predicted loss that is so many times faster on this
    machine, or the fastest that is within so many nats a token.
    """

    ffn: float = Field(default=0, ge=0)
    heads: float = Field(default=0, ge=0)
    kv_groups: float = Field(default=0, ge=0)
    layers: float = Field(default=0, ge=0)
    vocabulary: Literal["all", "from-text"] = "all"
    algorithm: str = "auto"
    depth: str = "block-influence"
    recover: Literal["none", "refit", "distill"] = "refit"
    tokens: int | None = Field(default=None, ge=64, le=1_000_000)
    steps: int = Field(default=400, ge=1, le=100_000)
    sparsity: float = Field(default=0, ge=0, lt=1)
    sparsifier: str = "sparsegpt"
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    speedup: float | None = Field(default=None, gt=1)
    max_kl: float | None = Field(default=None, gt=0)

    @property
    def pruner(self) -> str:
        """Return the algorithm's name, ``auto`` resolved."""
        return "surgeon" if self.algorithm == "auto" else self.algorithm

    @property
    def amounts(self) -> tuple[float, float, float, float]:
        """Return ``ffn``, ``heads``, ``kv_groups`` and ``layers``."""
        return self.ffn, self.heads, self.kv_groups, self.layers

    @property
    def searches(self) -> bool:
        """Return whether amounts are searched."""
        return self.speedup is not None or self.max_kl is not None

    @property
    def wanted(self) -> bool:
        """Return whether anything is removed."""
        return any(self.amounts) or self.searches or self.vocabulary != "all" or self.sparsity > 0

    @model_validator(mode="after")
    def _amounts_or_a_search(self) -> Prune:
        if self.searches and any(self.amounts):
            raise ValueError("prune.speedup and prune.max_kl search the amounts; give them or amounts, not both")
        if self.pattern == "2:4" and self.sparsity not in (0, 0.5):
            raise ValueError('prune.pattern = "2:4" is a sparsity of 0.5')
        return self


Fusion = Literal["attention", "packed_attention", "gelu", "skip_norm"]


class Graph(_Strict):
    """Shape of the graph.

    ``logits_to_keep`` (decoders) is the default of the optional graph input of that name: 0 computes the head for every
    position, k for the last k only.

    ``pooling`` and ``normalize`` (embeddings) make the output ``sentence_embedding`` inside the graph. ``auto`` takes
    what a sentence-transformers directory says, else the mean over the tokens, of unit length. ``none`` leaves the
    tokens' states alone.

    ``fusions`` (encoders) are the rewrite rules that are used: not every fused operator is faster everywhere.
    ``minimum_fusions`` is how often one of them must fire, each time a block is run, so that a graph which was not
    fused as expected is an error instead of a slow artifact. ``gelu = "tanh"`` computes exact GELUs by their tanh form,
    which differs by 5e-4 at most.

    ``tables = "standard"`` (encoders) looks rows of bytes up in standard operators, for runtimes that have no
    ``GatherBlockQuantized``: onnxruntime-web's wasm.

    ``static_length`` makes a graph of standard operators for one text of so many tokens, padded: every shape is a
    number, as NPUs want it. Decoders get two graphs, one for so many new tokens and one for a single one, over a
    key/value cache of ``cache_length`` tokens.

    ``attention = "materialized"`` (decoders) has a prompt's attention scores computed whole instead of in the runtime's
    tiles, which on x86 takes 0.4 to 1.0 of the time and, while a block runs, ``heads * new * total`` floats. Models
    with LongRoPE keep the runtime's way, because their prompts cannot be fed in pieces.

    ``cache_type = "int8"`` (decoders) keeps keys and values in bytes, a quarter of the memory, with a scale for every
    channel of every head that the calibration text shows. On CPUs a token behind a long text takes less time, and a
    prompt more (docs/performance.md).

    ``float_type = "float16"`` (decoders) halves what is not quantized, activations, cache and logits: for providers
    that multiply float16 as it is. Scales of quantized weights are float16 too then, as the kernels want them.
    """

    float_type: FloatType = "float32"
    logits_to_keep: int = Field(default=0, ge=0)
    pooling: Literal["auto", "mean", "cls", "max", "none"] = "auto"
    normalize: Literal["auto", "yes", "no"] = "auto"
    fusions: tuple[Fusion, ...] = ("attention", "packed_attention", "gelu")
    minimum_fusions: dict[Fusion, int] = Field(default_factory=dict)
    gelu: Literal["exact", "tanh"] = "exact"
    tables: Literal["fused", "standard"] = "fused"
    attention: AttentionWay = "runtime"
    cache_type: CacheType = "float"
    static_length: int | None = Field(default=None, ge=8, le=4096)
    cache_length: int = Field(default=512, ge=8, le=1 << 16)


class Validation(_Strict):
    """How much is measured; lengths are tokens.

    Decoders: ``tokens`` in windows of ``window``; speed with ``prompt_tokens`` and ``new_tokens``; source and artifact
    write up to ``sample_tokens`` tokens after each of four short prompts (0: none). Encoders: ``texts``
    cut to ``max_length`` tokens (default: 256, or all the positions of a model with fewer; labelled examples: all its
    positions); latency at every one of ``lengths`` that the model has positions for, in every one of ``batches``.
    Nodes of the operator types ``allowed_fallback`` may run elsewhere than on the provider.
    """

    tokens: int = Field(default=2048, ge=16)
    window: int = Field(default=512, ge=8)
    prompt_tokens: int = Field(default=128, ge=1)
    new_tokens: int = Field(default=32, ge=2)
    sample_tokens: int = Field(default=32, ge=0, le=1024)
    texts: int = Field(default=256, ge=8, le=100_000)
    max_length: int | None = Field(default=None, ge=8)
    lengths: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(16, 128, 512), min_length=1, max_length=16)
    batches: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(default=(1, 8), min_length=1, max_length=8)
    repeats: int = Field(default=3, ge=1, le=100)
    allowed_fallback: tuple[str, ...] = ()
    baselines: tuple[Literal["pytorch", "onnx_float"], ...] = ("pytorch", "onnx_float")


class Budget(_Strict):
    """What the artifact must keep; an absent number is not checked, nor is one that the model's task does not have.

    Decoders: ``max_kl``, ``min_top1_agreement``, ``max_perplexity_ratio``. Embeddings: ``min_cosine`` (the mean over
    texts), ``min_worst_cosine``, ``min_neighbour_agreement``. Other encoders: ``min_label_agreement``. With labelled
    examples (an export without them is not judged by these): ``max_accuracy_drop`` bounds the drop that was seen,
    ``max_accuracy_drop_bound`` the unfavourable end of its 95 % interval; both are shares, 0.005 is half a point.
    ``max_bytes`` bounds graph and weights together: a number, or a size with its unit (``88MB``, ``1.5GiB``). ``none``
    takes a budget of the profile away (``--set budget.min_speedup_vs_pytorch=none``).
    """

    max_kl: float | None = Field(default=None, gt=0)
    min_top1_agreement: float | None = Field(default=None, ge=0, le=1)
    max_perplexity_ratio: float | None = Field(default=None, gt=0)
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    min_worst_cosine: float | None = Field(default=None, ge=-1, le=1)
    min_neighbour_agreement: float | None = Field(default=None, ge=0, le=1)
    min_label_agreement: float | None = Field(default=None, ge=0, le=1)
    max_accuracy_drop: float | None = Field(default=None, ge=0, le=1)
    max_accuracy_drop_bound: float | None = Field(default=None, ge=0, le=1)
    min_speedup_vs_pytorch: float | None = Field(default=None, gt=0)
    min_speedup_vs_onnx_float: float | None = Field(default=None, gt=0)
    max_bytes: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _without(cls, data: object) -> object:
        return (
            {key: None if value == "none" else value for key, value in data.items()} if isinstance(data, dict) else data
        )

    @field_validator("max_bytes", mode="before")
    @classmethod
    def _with_unit(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("a size is a number of bytes, or 88MB, 1.5GiB")
        if not isinstance(value, str):
            return value
        try:
            return parse_size(value)
        except UsageError as error:
            raise ValueError(f"{error.what}; {error.hint}") from None


class Profile(_Strict):
    """A named recipe: what is stored how, for which provider and targets, and what may be lost.

    ``provider_options`` are ONNX Runtime's for that provider, as text (``soc_model = "SM8750"``).
    """

    name: str
    description: str
    provider: str = "cpu"
    provider_options: dict[str, str] = Field(default_factory=dict)
    targets: tuple[str, ...] = ("genai",)
    prune: Prune = Field(default_factory=Prune)
    quantize: Quantize = Field(default_factory=Quantize)
    calibration: Calibration = Field(default_factory=Calibration)
    graph: Graph = Field(default_factory=Graph)
    validation: Validation = Field(default_factory=Validation)
    budget: Budget = Field(default_factory=Budget)

    @model_validator(mode="after")
    def _window_fits(self) -> Profile:
        if self.validation.window > self.validation.tokens:
            raise ValueError("validation.window is longer than validation.tokens; lower it or measure more tokens")
        return self

    @model_validator(mode="after")
    def _static_graph_is_plain(self) -> Profile:
        quantize, graph = self.quantize, self.graph
        if quantize.activation_bits is not None and (quantize.activations != "static" or graph.static_length is None):
            raise ValueError(
                'quantize.activation_bits needs fixed ranges and shapes: set quantize.activations = "static" and '
                "graph.static_length"
            )
        if graph.static_length is not None and set(graph.fusions) - {"gelu"}:
            raise ValueError('graph.static_length is for standard operators: set graph.fusions = ["gelu"]')
        if graph.static_length is not None and graph.attention != "runtime":
            raise ValueError("graph.static_length is for standard operators: leave out graph.attention")
        if graph.static_length is not None and graph.cache_type != "float":
            raise ValueError(
                "a graph of fixed shapes has the cache that its provider makes of it: leave out graph.cache_type"
            )
        return self

    @model_validator(mode="after")
    def _rotations_are_of_products(self) -> Profile:
        if self.quantize.rotation != "none" and self.graph.static_length is not None:
            raise ValueError("quantize.rotation is for graphs of any length: leave out graph.static_length")
        return self

    @model_validator(mode="after")
    def _half_floats_have_kernels(self) -> Profile:
        if self.graph.float_type == "float32":
            return self
        if self.graph.static_length is not None:
            raise ValueError(
                'graph.float_type = "float16" is for graphs of any length: leave out graph.static_length, whose '
                "providers choose the type of floats themselves"
            )
        if self.graph.attention != "runtime":
            raise ValueError(
                'graph.attention = "materialized" is for float32: leave it out, or leave out graph.float_type'
            )
        roles = [*self.quantize.roles.values(), *self.quantize.decoder_roles.values()]
        if any(given not in (None, "none") for given in (self.quantize.activations, *(r.activations for r in roles))):
            raise ValueError(
                'products of integers read float32: set quantize.activations = "none", or leave out '
                'graph.float_type = "float16"'
            )
        return self

    @model_validator(mode="after")
    def _allocation_has_what_it_needs(self) -> Profile:
        if self.quantize.allocation == "budget":
            if self.budget.max_bytes is None and self.budget.max_kl is None:
                raise ValueError('quantize.allocation = "budget" needs one: set budget.max_bytes or budget.max_kl')
            if self.quantize.effort == "fast":
                raise ValueError(
                    'quantize.allocation = "budget" measures every tensor on a text: set quantize.effort = "balanced"'
                )
        return self


def profile_directories() -> list[Path]:
    """Return where profiles are looked for: inside the wheel, or the top-level folder of a checkout."""
    here = Path(__file__).resolve().parent
    return [path for path in (here / "_profiles", here.parent / "profiles") if path.is_dir()]


def available_profiles() -> dict[str, Path]:
    """Return every shipped profile's file by name, sorted by name."""
    found: dict[str, Path] = {}
    for directory in profile_directories():
        for path in directory.glob("*.toml"):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def load_profile(name: str, overrides: Iterable[str] = ()) -> Profile:
    """Read a profile by name or by the path of a ``.toml`` file and apply ``KEY=VALUE`` overrides.

    An override of ``budget.max_bytes`` or ``budget.max_kl`` also makes ``quantize.allocation`` keep that budget, unless
    another says what that shall be or the effort is ``fast``, which measures nothing to choose by.

    Raises:
        UsageError: No such profile, not valid TOML, an unknown key, or a value that does not fit.
    """
    path = Path(name) if name.endswith(".toml") else available_profiles().get(name)
    if path is None or not path.is_file():
        raise UsageError(f"no profile is named {name!r}", hint=did_you_mean(name, available_profiles()))
    if path.stat().st_size > _MAX_PROFILE_BYTES:
        raise UsageError("the profile is larger than any profile can be", where=str(path))
    return _overridden(_toml(path.read_bytes(), str(path)), overrides, where=path.name)


def _toml(content: bytes, where: str) -> dict[str, Any]:
    """Return what a profile's file says; a number of too many digits is a plain ``ValueError``."""
    if any(line.count(b".") > _MAX_DOTS for line in content.splitlines()):
        # The parser's time grows with the square of a dotted key's length.
        raise UsageError(f"not valid TOML here: a line has more than {_MAX_DOTS} dots", where=where)
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not valid TOML: {error}", where=where) from None


def override(profile: Profile, overrides: Iterable[str]) -> Profile:
    """Return a profile with ``KEY=VALUE`` overrides, which mean what they mean to :func:`load_profile`.

    Raises:
        UsageError: An unknown key, or a value that does not fit.
    """
    return _overridden(profile.model_dump(mode="json", exclude_unset=True), overrides, where=f"profile {profile.name}")


def _overridden(data: dict[str, Any], overrides: Iterable[str], *, where: str) -> Profile:
    keys = {key for change in overrides for key in _apply(data, change)}
    recipe = parse_profile(data, where=where)
    limits = {name for name in ("max_bytes", "max_kl") if getattr(recipe.budget, name) is not None}
    asked = not keys.isdisjoint(f"budget.{name}" for name in limits) and "quantize.allocation" not in keys
    if asked and recipe.quantize.effort != "fast":
        data.setdefault("quantize", {})["allocation"] = "budget"
        recipe = parse_profile(data, where=where)
    return recipe


def names_a_file(key: str, value: object) -> bool:
    """Return whether an option of ONNX Runtime makes it open a file: read it, write it, or load it as a library."""
    words = ("file", "path", "folder", "directory", "dir", "library", "ep.context", "profil")
    text = str(value)
    return any(word in key.lower() for word in words) or any(sign in text for sign in "/\\") or ".so" in text


def parse_stored_profile(data: object, *, where: str) -> Profile:
    """Validate the profile that an artifact keeps, which somebody else may have written.

    Raises:
        CompressError: It is none, or an option of it names a file: a provider would load it as a library.
    """
    if not isinstance(data, Mapping):
        raise CompressError("the profile is no object", where=where)
    try:
        recipe = parse_profile(data, where=where)
    except UsageError as error:
        raise CompressError(f"the artifact's profile is damaged: {error.what}", where=where) from None
    for key, value in recipe.provider_options.items():
        if names_a_file(key, value):
            raise CompressError(
                f"the provider option {key!r} names a file, which an artifact may not",
                where=where,
                hint="export it again with a profile of yours that has this option",
            )
    return recipe


def parse_profile(data: Mapping[str, Any], *, where: str) -> Profile:
    """Validate a profile's content.

    Raises:
        UsageError: With the key, what was wrong with it and the nearest key that exists.
    """
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        raise _explain(error, where) from None


def _apply(data: dict[str, Any], override: str) -> set[str]:
    """Set one dotted key; the value is read as TOML, and as a bare string where it is not. Returns the keys set."""
    key, separator, text = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not separator or not all(path):
        raise UsageError(f"--set {override!r} is not KEY=VALUE", hint="--set quantize.block_size=64")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        value = text
    target: Any = data
    for part in path[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise UsageError(f"--set {override!r}: {part!r} is a value, not a table of keys")
    target[path[-1]] = value
    whole = ".".join(path)
    return {whole} | ({f"{whole}.{name}" for name in value} if isinstance(value, dict) else set())


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Profile
    for part in location:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            # Below `roles` every key is a role and every value a SchemeOverride.
            return sorted(SchemeOverride.model_fields)
        model = field.annotation
    return sorted(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _explain(error: ValidationError, where: str) -> UsageError:
    first = error.errors()[0]
    location = tuple(part for part in first["loc"] if part != "[key]")
    key = ".".join(str(part) for part in location) or "the profile"
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(str(location[-1]), _fields_at(location[:-1]))
        return UsageError(f"unknown key {key!r}", where=where, hint=hint)
    shown = first.get("input")
    got = f", got {shown!r}" if isinstance(shown, (int, float, str, bool)) else ""
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    return UsageError(f"{key}: {first['msg']}{got}{more}", where=where, hint="compress profiles NAME shows a valid one")
