"""The protocols every plug-in keeps, on one page.

Data flows one way: a :class:`Checkpoint` is read row by row, a :class:`Family` says what its tensors are, a
:class:`Quantizer` turns rows of a weight into codes, a packager writes them, a :class:`Provider` runs the result.
Arrays are NumPy; nothing here imports torch, transformers or onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


# ---------------------------------------------------------------------------------------------------------- source


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint's header says of one tensor.

    Attributes:
        name: The tensor's name in the checkpoint.
        shape: Dimensions, outermost first.
        dtype: Storage type by its safetensors name (``F32``, ``F16``, ``BF16``) or GGUF name (``Q4_1`` ...).
        nbytes: Bytes it takes in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class SourceFile:
    """One file of the source, for the manifest: its name, size in bytes and SHA-256 (hexadecimal)."""

    name: str
    size: int
    sha256: str


@runtime_checkable
class Checkpoint(Protocol):
    """A model's config and weights; a tensor's rows are read when asked for, never the whole model.

    Attributes:
        reference: What the user asked for, as given.
        kind: ``directory``, ``hub``, ``gguf`` or ``package``.
        identifier: The hub id, package or base name, as the manifest shows it (no local path).
        revision: The resolved hub commit or package version, if there is one.
        config: The Hugging Face ``config.json`` as a mapping.
        directory: A local directory with ``config.json`` and the tokenizer that transformers can read.
    """

    reference: str
    kind: str
    identifier: str
    revision: str | None
    config: Mapping[str, Any]
    directory: Path

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every tensor's header by name."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> FloatArray:
        """Return rows ``[start, stop)`` along axis 0 as a new C-contiguous float32 array.

        Raises:
            SourceError: The tensor is unknown, or the file does not hold the bytes its header promises.
        """
        ...

    def files(self) -> Sequence[SourceFile]:
        """Return the source's files with their digests (reads each file once; may take seconds per GB)."""
        ...

    def stamps(self) -> Mapping[str, tuple[int, ...]]:
        """Return numbers that change when one of the source's files is written to, by file name; reads none of them."""
        ...

    def sidecars(self) -> Mapping[str, Path]:
        """Return tokenizer, template and generation files that an artifact takes over unchanged, by file name."""
        ...


# ---------------------------------------------------------------------------------------------------------- family

Role = Literal[
    "qkv",
    "attention_output",
    "gate_up",
    "up",
    "down",
    "head",
    "embedding",
    "position",
    "projection",
    "pooler",
    "classifier",
    "rotation",
]


@dataclass(frozen=True)
class Slice:
    """Rows ``[start, stop)`` of a checkpoint tensor seen as ``[out_features, in_features]``.

    ``transposed`` says that the tensor is stored as ``[in_features, out_features]`` (GPT-2's Conv1D). ``columns``: only
    the first so many columns count; ``spare``: so many rows behind ``stop`` are left out on purpose. Both are zeros of
    heads that were removed, in a checkpoint whose config cannot say so (:data:`KEPT_HEADS`). ``mixed``: every row is
    made of all rows of the source (:mod:`compress.rotation`), so they are best read at once.
    """

    tensor: str
    start: int = 0
    stop: int | None = None
    transposed: bool = False
    columns: int | None = None
    spare: int = 0
    mixed: bool = False

    @property
    def whole(self) -> bool:
        """Whether reading some rows reads all of the tensor."""
        return self.transposed or self.mixed


@dataclass(frozen=True)
class Linear:
    """A matrix product ``y = x W^T + b`` of the graph; several checkpoint weights may be stacked along rows.

    Attributes:
        name: Its name in the artifact, without ``.weight``.
        role: What it does in the block.
        layer: Decoder block index, ``None`` outside the blocks.
        out_features: Rows N of the stacked weight.
        in_features: Columns K.
        weight: Where the rows come from, in order.
        bias: Where the bias comes from, in order; empty without one.
        graph_weights: The skeleton's initializers that the stacked weight replaces, in order.
        graph_biases: The same for the bias.
        hadamard: The inputs are multiplied by an orthonormal Hadamard matrix first, in blocks of so many channels; 0:
            they are not.
        input_range: Inputs are normally distributed and of unit size, whatever the text: dynamic integer products take
            this range of them; 0: nothing is known of them.

    Of an encoder, ``layer`` counts the weights: a layer that is run several times (ALBERT) has one.
    """

    name: str
    role: Role
    layer: int | None
    out_features: int
    in_features: int
    weight: tuple[Slice, ...]
    bias: tuple[Slice, ...] = ()
    graph_weights: tuple[str, ...] = ()
    graph_biases: tuple[str, ...] = ()
    hadamard: int = 0
    input_range: float = 0


@dataclass(frozen=True)
class Table:
    """An embedding table ``[rows, columns]`` that a Gather reads."""

    name: str
    rows: int
    columns: int
    source: Slice
    graph_name: str
    role: Literal["token", "position", "type"] = "token"


@dataclass(frozen=True)
class Vector:
    """A norm's weight or bias, kept in float32."""

    graph_name: str
    source: Slice
    size: int


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A model as its family reads it from config and tensor headers; sizes in elements.

    ``layers`` counts the times a block is run, ``context_length`` the most positions it knows. ``tied``: the head's
    weight is the token table.
    """

    model_type: str
    layers: int
    hidden_size: int
    heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    tied: bool
    tables: tuple[Table, ...]
    linears: tuple[Linear, ...]
    vectors: tuple[Vector, ...]


@dataclass(frozen=True)
class Fold:
    """What a linear's input channels come from, so that a scale of them can be folded away.

    Attributes:
        reader: The linear, by name.
        vectors: Norm weight (and bias) that are divided, by graph name; or
        producer: the linear whose rows, from ``start`` on, are divided. ``group`` query heads of ``head_dim`` channels
            read the same rows; 1 and 0 where every channel has a row of its own.
    """

    reader: str
    vectors: tuple[str, ...] = ()
    producer: str = ""
    start: int = 0
    group: int = 1
    head_dim: int = 0


@dataclass(frozen=True, kw_only=True)
class Decoder(Structure):
    """A model that writes text.

    ``folds`` are the linears whose input channels can be rescaled without a change of the function.
    ``rope_shape`` is the shape of the rotary cosine table (the sine table's too), ``None`` without rotary embedding.
    ``rope_switch``: sequences longer than this read the table from that row on (LongRoPE's two sets of factors).
    """

    kv_heads: int
    genai_type: str
    folds: tuple[Fold, ...] = ()
    rope_shape: tuple[int, int] | None = None
    rope_switch: int | None = None


@dataclass(frozen=True)
class Junction:
    """A value of the residual stream that linears read and a residual sum adds to: where outlier channels are tamed.

    Attributes:
        name: Its name: the first reader's.
        norms: LayerNorms that produce it, by graph name without ``.weight``.
        producers: Linears that produce it (an embedding's projection), by name.
        readers: Linears that multiply it, by name.
        added: Linears whose output it is added to, by name.
        last: Whether it is also what the last block gives.
    """

    name: str
    norms: tuple[str, ...]
    producers: tuple[str, ...]
    readers: tuple[str, ...]
    added: tuple[str, ...]
    last: bool = False


@dataclass(frozen=True, kw_only=True)
class Encoder(Structure):
    """A model that reads text at once: an embedding of it, or a task's scores.

    Attributes:
        task: Its task's name in :mod:`compress.tasks`.
        inputs: Graph inputs in order: ``input_ids``, ``attention_mask`` and, where it has them, ``token_type_ids``;
            each int64 ``[batch, sequence]``.
        labels: Names of a classifier's outputs, in order; empty for other tasks.
        junctions: Where its blocks meet, in order.
        tanh: Its GELU is the tanh form.
    """

    task: str
    inputs: tuple[str, ...]
    labels: tuple[str, ...] = ()
    junctions: tuple[Junction, ...] = ()
    tanh: bool = False


#: Key of a config: how many heads a block has left, the first ones, where transformers takes their size from their
#: number. The checkpoint keeps zeros in the place of the others, so that transformers loads it; artifacts do not.
KEPT_HEADS = "kept_heads"


@dataclass(frozen=True)
class SizeKeys:
    """What a config calls the sizes that pruning changes.

    Attributes:
        layers: How often blocks are run.
        inner: Neurons of the feed-forward.
        heads: Query heads.
        kv_heads: Key-value heads, where they can be fewer.
        head_dim: A head's size, where a config can say it; ``None``: transformers divides the hidden size by the heads,
            and removed ones stay as zeros (:data:`KEPT_HEADS`).
        vocabulary: Rows of the token table.
        heads_divide: transformers refuses a number of heads that does not divide the hidden size.
    """

    layers: str
    inner: str
    heads: str
    kv_heads: str | None = None
    head_dim: str | None = None
    vocabulary: str = "vocab_size"
    heads_divide: bool = False


class Runner(Protocol):
    """What a forward pass asks for; weights are streamed behind it. T tokens, K inputs, N outputs, C channels."""

    def rows(self, table: str, indices: npt.NDArray[np.int64]) -> FloatArray:
        """Return rows ``[T, C]`` of a table, by its name in the plan."""
        ...

    def vector(self, name: str) -> FloatArray:
        """Return a norm's weight or bias ``[C]``, by its name in the graph."""
        ...

    def linear(self, name: str, inputs: FloatArray) -> FloatArray:
        """Return a linear's outputs ``[T, N]`` for its inputs ``[T, K]``, bias included."""
        ...

    def observe(self, name: str, inputs: FloatArray) -> None:
        """Take note of a linear's inputs without computing its outputs (the head)."""
        ...


class Family(Protocol):
    """One ``model_type``: what its tensors are and how they map to the graph skeleton's parameters."""

    model_type: str
    architectures: tuple[str, ...]

    def describe(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Structure:
        """Read the structure from config and headers alone: a :class:`Decoder` or an :class:`Encoder`.

        Raises:
            SourceError: Config and tensor shapes disagree, or a tensor is missing.
            UnsupportedModelError: The config asks for something that has no implementation.
        """
        ...


@runtime_checkable
class PrunableFamily(Family, Protocol):
    """A family whose parts can be removed: its structure says which tensors they are, this what its config says."""

    sizes: SizeKeys


@runtime_checkable
class ForwardFamily(Family, Protocol):
    """A family whose blocks can be run tensor by tensor, for the statistics of their inputs."""

    def forward(
        self, config: Mapping[str, Any], decoder: Decoder, tokens: npt.NDArray[np.int64], runner: Runner
    ) -> None:
        """Run one sequence of token ids ``[T]`` through the model, block by block, for the statistics of its linears.

        Every linear is asked for once, in the plan's order; the head is only observed.
        """
        ...


# ----------------------------------------------------------------------------------------------------------- prune

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Units:
    """What may be removed of a linear's inputs, seen by the linear that reads them.

    A unit is ``size`` neighbouring input channels: 1 for a feed-forward neuron, ``head_dim`` (times the query heads
    of a group) for heads.

    Attributes:
        weight: float32 ``[N, K]`` of the linear that reads the channels; K is a multiple of ``size``.
        produced: float32 ``[K]``: squares of the weights that produce each channel, summed.
        moments: float32 ``[K, K]``: second moments of the channels on calibration tokens; ``None`` without text. They
            are the pruner's to overwrite: 8,192 channels have 268 MB of them.
        size: Channels a unit.
        classes: int64 ``[K / size]``: units of one class (query heads that share keys and values) lose equally many;
            ``None``: all are of one class.
    """

    weight: FloatArray
    produced: FloatArray
    moments: FloatArray | None = None
    size: int = 1
    classes: IntArray | None = None

    @property
    def count(self) -> int:
        """Return how many units there are."""
        return int(self.weight.shape[1]) // self.size


@dataclass(frozen=True)
class Removal:
    """Units in the order of their removal; ``losses`` float64 ``[removed + 1]``: what is lost once so many are gone.

    A loss is the share of the power of the reading linear's outputs, after the best correction that the algorithm knows
    of; a score of no such meaning is NaN.
    """

    order: IntArray
    losses: npt.NDArray[np.float64]


class Pruner(Protocol):
    """Chooses neurons and heads. A module of :mod:`compress.prune` that defines ``PRUNER`` adds one.

    Attributes:
        name: As profiles have it.
        reads_text: Whether it needs ``Units.moments``.
    """

    name: str
    reads_text: bool

    def remove(self, units: Units, count: int, *, seed: int) -> Removal:
        """Choose ``count`` units to remove, a multiple of the number of classes."""
        ...


class DepthPruner(Protocol):
    """Chooses blocks. A module of :mod:`compress.prune` that defines ``DEPTH_PRUNER`` adds one."""

    name: str

    def remove(self, states: FloatArray, count: int) -> IntArray:
        """Choose ``count`` blocks to remove, ascending.

        Args:
            states: float32 ``[blocks + 1, tokens, hidden]``: what goes into every block, and what the last one gives.
            count: How many.
        """
        ...


# -------------------------------------------------------------------------------------------------------- quantize


#: What a product does with its inputs: ``none`` keeps them in float32; ``dynamic`` rounds them to 8 bits with a range
#: found at run time, ``static`` with one found by calibration. Both multiply integers.
Activations = Literal["none", "dynamic", "static"]


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored: ``bits`` per code, one scale per ``block_size`` columns, zero point or not.

    Codes are unsigned, ``0 .. 2**bits - 1``. Symmetric schemes fix the zero point at ``2**(bits-1)``.
    ``block_size`` 0 is one block a row: a scale an output channel. Integer products (``activations``) need that.
    ``pair_safe``: their sums are exact on processors that add two products in 16 bits, too
    (:mod:`compress.quantize.integer`).
    """

    bits: int
    block_size: int
    symmetric: bool
    activations: Activations = "none"
    pair_safe: bool = True

    def blocks(self, columns: int) -> int:
        """Return the number of blocks a row of ``columns`` has; the last one may be partly filled."""
        return -(-columns // (self.block_size or columns))


#: How scales are stored: float32 or float16 a block, or int8 a block times one float32 a row.
ScaleFormat = Literal["float32", "float16", "int8"]
#: What a graph's weights that are not quantized, its activations and its cache are.
FloatType = Literal["float32", "float16"]
#: Who decides how a decoder's attention holds its scores: the runtime, or the graph, which has them held whole.
AttentionWay = Literal["runtime", "materialized"]
#: How a decoder's graph keeps keys and values from token to token: in its own floats, or rounded to bytes.
CacheType = Literal["float", "int8"]


@dataclass(frozen=True)
class QuantizedRows:
    """Quantized rows, not packed yet.

    Attributes:
        codes: uint8 ``[rows, blocks * block_size]``; columns past the weight's width hold the zero point.
        scales: float32 ``[rows, blocks]``; may be negative.
        zero_points: uint8 ``[rows, blocks]``, or ``None`` for a symmetric scheme.
    """

    codes: ByteArray
    scales: FloatArray
    zero_points: ByteArray | None


class Quantizer(Protocol):
    """An algorithm that quantizes rows independently of each other (data-free ones do)."""

    name: str

    def quantize(
        self,
        weight: FloatArray,
        scheme: Scheme,
        importance: FloatArray | None = None,
        *,
        scale_format: ScaleFormat = "float32",
        moments: FloatArray | None = None,
    ) -> QuantizedRows:
        """Quantize ``weight`` float32 ``[rows, columns]``.

        Args:
            weight: Finite values.
            scheme: Bits, block size, symmetry.
            importance: float32 ``[columns]``, positive: expected second moment of each input channel up to a factor.
            scale_format: What scales are stored as; they are rounded to it before codes are chosen.
            moments: float32 ``[columns, columns]``: second moments of the inputs up to a factor, where they are known.
        """
        ...


@dataclass(frozen=True)
class InputStatistics:
    """What a linear's inputs were on calibration tokens.

    Attributes:
        moments: float32 ``[K, K]``: mean of ``x x^T`` over tokens.
        magnitude: float32 ``[K]``: mean of ``|x|`` over tokens.
        tokens: How many tokens it is the mean of.
    """

    moments: FloatArray
    magnitude: FloatArray
    tokens: int


@runtime_checkable
class ChannelScaler(Protocol):
    """A quantizer that rescales input channels first: ``W x = (W diag(s)) (x / s)``, with ``1 / s`` folded away.

    The driver folds ``1 / s`` into what produces the inputs (a norm's weight, rows of the linear before) and hands the
    scaled weight to :meth:`Quantizer.quantize`: no operator is added to the graph.
    """

    def channel_scales(
        self,
        weight: FloatArray,
        scheme: Scheme,
        inputs: InputStatistics,
        *,
        shared: npt.NDArray[np.int64] | None = None,
        scale_format: ScaleFormat = "float32",
    ) -> FloatArray:
        """Return ``s`` float32 ``[K]``, positive, for ``weight`` float32 ``[N, K]``.

        Args:
            weight: Finite values.
            scheme: How the scaled weight will be stored.
            inputs: Statistics of the inputs as they are now.
            shared: int64 ``[K]``: channels with the same number have one producer and must get the same scale (grouped
                query attention: every query head of a group reads the same values).
            scale_format: What block scales are rounded to.
        """
        ...


class LearntBlock(Protocol):
    """A decoder block as a :class:`BlockLearner` sees it; tensors are torch's, float32."""

    index: int
    layer: Any

    @property
    def hidden(self) -> Any:  # noqa: ANN401 - torch is not imported here
        """Return what the block reads."""
        ...

    @property
    def linears(self) -> Sequence[Any]:
        """Return its planned linears in the order that they run."""
        ...

    def call(self, hidden: Any, rows: slice) -> Any:  # noqa: ANN401 - torch is not imported here
        """Run the block on the windows ``rows``, whose inputs are ``hidden`` ``[rows, length, hidden]``."""
        ...


@runtime_checkable
class BlockLearner(Protocol):
    """A quantizer that learns a whole block's rounding from what the block should give."""

    def learn(
        self, block: LearntBlock, fates: Mapping[str, Any], targets: Any, scale_format: ScaleFormat
    ) -> Mapping[str, QuantizedRows]:  # noqa: ANN401
        """Return every planned linear of the block, quantized.

        Args:
            block: Its inputs are those of the quantized blocks before it.
            fates: The plan's :class:`compress.planning.Fate` of each linear to quantize, by name.
            targets: The outputs to come near to, float32 ``[windows, length, hidden]``.
            scale_format: What block scales are rounded to.
        """
        ...


# -------------------------------------------------------------------------------------------------------- provider

#: What a run on this machine proves. ``measured``: real hardware. ``simulated``: a vendor's simulator of it.
#: ``emulated``: another processor in software. ``static``: nothing was run, a tool read the graph.
Evidence = Literal["measured", "simulated", "emulated", "static", "none"]


@dataclass(frozen=True)
class Runtime:
    """How to start the Python that has a provider's onnxruntime.

    Attributes:
        command: The interpreter, with whatever has to stand before it and what has to stand before ``-m``.
        environment: Variables to set.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class Provider(Protocol):
    """One ONNX Runtime execution provider: how to start it, what it supports, how to tell that it fell back.

    ``runtime`` and ``install`` are called in the main process, which need not have the provider's onnxruntime and never
    starts a session. ``available``, ``device``, ``evidence`` and ``session`` are called in a worker that ``runtime``
    started: they may crash or hang.

    Attributes:
        name: As the command line has it.
        onnxruntime_name: As ONNX Runtime has it.
        static_shapes: Whether it takes only graphs whose every dimension is a number.
        cache_device: ONNX Runtime's name of the memory that a decoder's cache stays in between steps, ``None`` for
            the host's.
    """

    name: str
    onnxruntime_name: str
    static_shapes: bool
    cache_device: str | None

    def runtime(self) -> Runtime:
        """Return how to start a process that can use it.

        Raises:
            ProviderError: Something is missing here; with the exact command that would make it work.
        """
        ...

    def install(self, say: Callable[[str], None]) -> None:
        """Put what is missing into the cache, never into the user's environment; ``say`` is told each step.

        Raises:
            ProviderError: It cannot be installed on this machine; why.
        """
        ...

    def available(self) -> tuple[bool, str]:
        """Return whether it works in this process, and its versions or the reason and the remedy."""
        ...

    def device(self) -> str:
        """Return what it runs on, in words."""
        ...

    def evidence(self) -> Evidence:
        """Return what a run on this machine proves."""
        ...

    def tokens_at_once(self) -> int | None:
        """Return the most new tokens a decoder may be given in one run here, ``None`` where any number is right."""
        ...

    def session(
        self, model: Path, options: Mapping[str, str], threads: int, provider_options: Mapping[str, str] | None = None
    ) -> Any:
        """Return an ``onnxruntime.InferenceSession`` bound to this provider, which records where each node runs.

        Args:
            model: The graph.
            options: Session options by their genai_config.json names, and config entries (dotted keys).
            threads: Threads inside an operator, where that means something.
            provider_options: The provider's own options, as text.

        Raises:
            ProviderError: The provider refuses the graph.
            UsageError: An option makes no sense.
        """
        ...

    def supports(self, scheme: Scheme) -> str | None:
        """Return why a scheme cannot run here fast, or ``None`` if it can."""
        ...

    def supports_cache(self, kept: CacheType) -> str | None:
        """Return why a decoder's cache cannot be kept like that here, or ``None`` if it can."""
        ...


@runtime_checkable
class StaticallyChecked(Protocol):
    """A provider whose operators are known where it cannot run: a graph can be read with them."""

    def static_placement(self, model: Path) -> Mapping[str, Any]:
        """Return the placement that operator lists foretell; called in a worker of this Python.

        Its keys are ``provider``, ``nodes_total``, ``nodes_on_provider``, ``fallback_nodes``.
        """
        ...


# -------------------------------------------------------------------------------------------------------- sparsify


class Sparsifier(Protocol):
    """An algorithm that sets single weights to zero and leaves every shape as it was.

    For runtimes with kernels for that; ONNX Runtime has none, there such a model is no faster.
    """

    name: str

    def sparsify(
        self, weight: FloatArray, sparsity: float, pattern: tuple[int, int] | None, moments: FloatArray
    ) -> FloatArray:
        """Return the weight float32 ``[N, K]`` with zeros in it; the others may have been changed to make up for them.

        Args:
            weight: float32 ``[N, K]``, finite; all rows of the linear.
            sparsity: Part of the weights to set to zero, 0 to below 1.
            pattern: ``(n, m)``: of m neighbours in a row, counted from its start, n stay. ``sparsity`` is then
                ``1 - n / m``. ``None``: anywhere.
            moments: float32 ``[K, K]``: second moments of the inputs up to a factor.

        Raises:
            UsageError: Sparsity and pattern contradict each other, leave nothing, or do not fit K.
            CompressError: The weight or the moments are not finite, or no moments.
            ValueError: Shapes or types do not fit.
        """
        ...
