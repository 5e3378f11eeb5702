"""Encoders of the BERT shape: embeddings, post-norm blocks of attention and feed-forward, a task's head.

A family says how its checkpoint calls the parts (:class:`Names`) and what its heads are made of; the structure is read
here, once. Graph names are the parameter names of transformers' class for the task; the checkpoint may lack or have the
base model's prefix, and old ones call a norm's weight and bias ``gamma`` and ``beta``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.contracts import Encoder, Junction, Linear, Role, SizeKeys, Slice, Table, TensorInfo, Vector
from compress.errors import SourceError
from compress.families._reading import (
    check_shapes,
    dimension,
    expect,
    flag,
    kept_heads,
    layer_count,
    number,
    position_count,
)
from compress.tasks import TASKS, Task, architecture_of, task_of

#: Activations that the graph rules know; transformers writes the tanh form three ways.
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_MAX_LABELS = 1 << 16


@dataclass(frozen=True)
class Names:
    """What a family calls the parts of a block, below the block's own name; norms and linears without ``.weight``."""

    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    up: str
    down: str
    output_norm: str


@dataclass(frozen=True)
class Shape:
    """Sizes of an encoder, read from its config; ``kept_heads`` of ``heads`` are left in a pruned one."""

    hidden: int
    embedding: int
    inner: int
    heads: int
    layers: int
    vocab: int
    positions: int
    types: int
    kept_heads: int

    @property
    def mixed(self) -> int:
        """Channels that attention mixes: those of the heads that are left."""
        return self.hidden // self.heads * self.kept_heads


class _Builder:
    """Collects parts, finding each in the checkpoint."""

    def __init__(self, prefix: str, task: Task, tensors: Mapping[str, TensorInfo]) -> None:
        self._prefix, self._tensors = prefix, tensors
        # transformers' base class has no prefix, classes with a head keep the base model under it.
        self._graph_prefix = "" if task.name == "embedding" else f"{prefix}."
        self.linears: list[Linear] = []
        self.tables: list[Table] = []
        self.vectors: list[Vector] = []

    def base(self, name: str) -> str:
        """Return the graph's name of a part of the base model."""
        return f"{self._graph_prefix}{name}"

    def stored(self, graph_name: str) -> str:
        """Return the checkpoint's name of a parameter; the graph's own where it has none (the check names it then)."""
        core = graph_name.removeprefix(self._graph_prefix)
        names = [graph_name]
        if core != graph_name or not self._graph_prefix:
            names += [f"{self._prefix}.{core}", core]
        old = {".weight": ".gamma", ".bias": ".beta"}
        names += [name.removesuffix(new) + was for name in names for new, was in old.items() if name.endswith(new)]
        return next((name for name in names if name in self._tensors), graph_name)

    def has(self, graph_name: str) -> bool:
        """Return whether the checkpoint has a parameter; a config alone promises everything."""
        return not self._tensors or self.stored(graph_name) in self._tensors

    def rows(self, graph_name: str) -> int | None:
        """Return a parameter's rows, ``None`` where only the config is known."""
        info = self._tensors.get(self.stored(graph_name))
        return info.shape[0] if info is not None and info.shape else None

    def table(self, name: str, rows: int, columns: int, role: Any) -> None:
        """Add an embedding table."""
        graph = f"{name}.weight"
        self.tables.append(Table(name, rows, columns, Slice(self.stored(graph)), graph, role))

    def norm(self, name: str, size: int) -> None:
        """Add a LayerNorm."""
        for graph in (f"{name}.weight", f"{name}.bias"):
            self.vectors.append(Vector(graph, Slice(self.stored(graph)), size))

    def linear(
        self,
        name: str,
        parts: Sequence[str],
        role: Role,
        rows: int,
        columns: int,
        layer: int | None,
        *,
        spare: int = 0,
        narrowed: bool = False,
    ) -> None:
        """Add a linear made of parts with equally many rows, each with a bias.

        ``spare`` rows of every part, and with ``narrowed`` the columns beyond ``columns``, are those of removed heads.
        """
        step = rows // len(parts)
        stop = step if spare or len(parts) > 1 else None

        def slices(names: Sequence[str], columns: int | None) -> tuple[Slice, ...]:
            return tuple(Slice(self.stored(part), 0, stop, columns=columns, spare=spare) for part in names)

        weights = tuple(f"{part}.weight" for part in parts)
        biases = tuple(f"{part}.bias" for part in parts)
        self.linears.append(
            Linear(
                name=name,
                role=role,
                layer=layer,
                out_features=rows,
                in_features=columns,
                weight=slices(weights, columns if narrowed else None),
                bias=slices(biases, None),
                graph_weights=weights,
                graph_biases=biases,
            )
        )

    def single(self, name: str, role: Role, rows: int, columns: int, layer: int | None = None) -> None:
        """Add a linear that is one tensor."""
        self.linear(name, (name,), role, rows, columns, layer)


@dataclass(frozen=True)
class FillMask:
    """A masked-word head: a dense layer back to the embedding's width, a norm, and the table with a bias."""

    dense: str
    norm: str
    decoder: str
    bias: str


class BidirectionalFamily:
    """An encoder family; see :class:`compress.contracts.Family`."""

    def __init__(
        self,
        model_type: str,
        stem: str,
        *,
        block: Callable[[int], str],
        names: Names,
        fill_mask: FillMask,
        keys: Mapping[str, str] | None = None,
        types: bool = True,
        projection: str | None = None,
        always_projected: bool = False,
        classifier: Sequence[tuple[str, Role]] = (("classifier", "classifier"),),
        pooler: str | None = None,
        stored_layers: Callable[[Shape, Mapping[str, Any]], int] | None = None,
        refuse: Mapping[str, tuple[Any, ...]] | None = None,
    ) -> None:
        self.model_type = model_type
        self.architectures = tuple(
            f"{stem}{suffix}" for task in reversed(TASKS) if task.name != "text-generation" for suffix in task.suffixes
        )
        self._prefix, self._block, self._names, self._fill_mask = model_type, block, names, fill_mask
        self._keys = dict(keys or {})
        self._types, self._projection, self._classifier = types, projection, tuple(classifier)
        self._always_projected = always_projected
        self._pooler, self._stored_layers = pooler, stored_layers
        self._refuse = dict(refuse or {})
        self.sizes = SizeKeys(
            layers=self._key("num_hidden_layers"),
            inner=self._key("intermediate_size"),
            heads=self._key("num_attention_heads"),
        )

    def describe(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Encoder:
        """Read the structure; see :class:`compress.contracts.Family`."""
        task = task_of({"architectures": [architecture_of(config) or self.architectures[0]]})
        expect(config, self._key("hidden_act"), ACTIVATIONS, "gelu")
        for key, (allowed, default) in self._refuse.items():
            expect(config, key, allowed, default)
        number(config, "layer_norm_eps", 1e-12, most=1.0)
        shape = self._shape(config)
        build = _Builder(self._prefix, task, tensors)
        self._embeddings(build, shape)
        blocks = self._stored_layers(shape, config) if self._stored_layers else shape.layers
        for index in range(blocks):
            self._add_block(build, shape, index)
        junctions = self._junctions(build, shape, blocks)
        labels = self._head(build, shape, task, config)
        return check_shapes(
            Encoder(
                model_type=self.model_type,
                layers=shape.layers,
                hidden_size=shape.hidden,
                heads=shape.kept_heads,
                head_dim=shape.hidden // shape.heads,
                vocab_size=shape.vocab,
                context_length=shape.positions,
                tied=task.name == "fill-mask" and flag(config, "tie_word_embeddings", True),
                tables=tuple(build.tables),
                linears=tuple(build.linears),
                vectors=tuple(build.vectors),
                task=task.name,
                inputs=("input_ids", "attention_mask", *(("token_type_ids",) if self._types else ())),
                labels=labels,
                junctions=junctions,
                tanh=config.get(self._key("hidden_act"), "gelu") != "gelu",
            ),
            tensors,
        )

    def _key(self, name: str) -> str:
        return self._keys.get(name, name)

    def _shape(self, config: Mapping[str, Any]) -> Shape:
        hidden, heads = dimension(config, self._key("hidden_size")), dimension(config, self._key("num_attention_heads"))
        if hidden % heads:
            raise SourceError(f"config.json: hidden size {hidden} is not a multiple of {heads} attention heads")
        embedding = dimension(config, "embedding_size", 128) if self._projection else hidden
        return Shape(
            hidden=hidden,
            embedding=embedding,
            inner=dimension(config, self._key("intermediate_size")),
            heads=heads,
            layers=layer_count(config, self._key("num_hidden_layers")),
            vocab=dimension(config, "vocab_size"),
            positions=position_count(config, "max_position_embeddings", embedding, 512),
            types=dimension(config, "type_vocab_size", 2) if self._types else 0,
            kept_heads=kept_heads(config, heads),
        )

    def _embeddings(self, build: _Builder, shape: Shape) -> None:
        place = build.base("embeddings")
        build.table(f"{place}.word_embeddings", shape.vocab, shape.embedding, "token")
        build.table(f"{place}.position_embeddings", shape.positions, shape.embedding, "position")
        if shape.types:
            build.table(f"{place}.token_type_embeddings", shape.types, shape.embedding, "type")
        build.norm(f"{place}.LayerNorm", shape.embedding)
        if self._projection and (self._always_projected or shape.embedding != shape.hidden):
            build.single(build.base(self._projection), "projection", shape.hidden, shape.embedding)

    def _add_block(self, build: _Builder, shape: Shape, index: int) -> None:
        block, names = build.base(self._block(index)), self._names
        parts = [f"{block}.{part}" for part in (names.query, names.key, names.value)]
        removed = shape.hidden - shape.mixed
        build.linear(_packed(parts), parts, "qkv", 3 * shape.mixed, shape.hidden, index, spare=removed)
        output = f"{block}.{names.attention_output}"
        build.linear(output, (output,), "attention_output", shape.hidden, shape.mixed, index, narrowed=removed > 0)
        build.norm(f"{block}.{names.attention_norm}", shape.hidden)
        build.single(f"{block}.{names.up}", "up", shape.inner, shape.hidden, index)
        build.single(f"{block}.{names.down}", "down", shape.hidden, shape.inner, index)
        build.norm(f"{block}.{names.output_norm}", shape.hidden)

    def _junctions(self, build: _Builder, shape: Shape, blocks: int) -> tuple[Junction, ...]:
        """Return the two values of every block that linears read: its input, and what follows its attention."""
        if blocks not in (1, shape.layers):
            return ()  # a value that several different blocks read has no one scale
        projected = [linear.name for linear in build.linears if linear.name == build.base(self._projection or "")]
        found = []
        for index in range(blocks):
            block, names = build.base(self._block(index)), self._names
            before = [] if index or projected else [build.base("embeddings.LayerNorm")]
            if index or (blocks == 1 and shape.layers > 1):  # a block that is run again reads its own output
                before.append(f"{build.base(self._block(max(index - 1, 0)))}.{names.output_norm}")
            qkv = _packed([f"{block}.{names.query}"])
            up, down = f"{block}.{names.up}", f"{block}.{names.down}"
            first = tuple(projected) if not index else ()
            output = f"{block}.{names.attention_output}"
            found.append(Junction(qkv, tuple(before), first, (qkv,), (output,), last=blocks < shape.layers))
            found.append(Junction(up, (f"{block}.{names.attention_norm}",), (), (up,), (down,)))
        return tuple(found)

    def _head(self, build: _Builder, shape: Shape, task: Task, config: Mapping[str, Any]) -> tuple[str, ...]:
        if task.name == "fill-mask":
            self._add_fill_mask(build, shape, config)
            return ()
        if task.name == "embedding":
            return ()
        last = {"text-classification": self._classifier[-1][0], "token-classification": "classifier"}
        name = last.get(task.name, "qa_outputs")
        if not build.has(f"{name}.weight"):
            raise SourceError(
                f"the checkpoint has no {task.name} head",
                where=f"{name}.weight",
                hint="fine-tune the model for the task first, or export what it can do: --task embedding",
            )
        if task.name == "question-answering":
            build.single(name, "classifier", 2, shape.hidden)
            return ()
        labels = _labels(config, build, f"{name}.weight")
        if task.name == "text-classification":
            if self._pooler:
                build.single(build.base(self._pooler), "pooler", shape.hidden, shape.hidden)
            for dense, role in self._classifier[:-1]:
                build.single(dense, role, shape.hidden, shape.hidden)
        build.single(name, "classifier", len(labels), shape.hidden)
        return labels

    def _add_fill_mask(self, build: _Builder, shape: Shape, config: Mapping[str, Any]) -> None:
        head = self._fill_mask
        expect(config, "tie_word_embeddings", (True,), True)
        if not build.has(f"{head.dense}.weight"):
            raise SourceError(
                "the checkpoint has no fill-mask head",
                where=f"{head.dense}.weight",
                hint="export what it can do: --task embedding",
            )
        build.single(head.dense, "projection", shape.embedding, shape.hidden)
        build.norm(head.norm, shape.embedding)
        table = build.tables[0]
        build.linears.append(
            Linear(
                name=head.decoder,
                role="head",
                layer=None,
                out_features=shape.vocab,
                in_features=shape.embedding,
                weight=(table.source,),
                bias=(Slice(build.stored(head.bias)),),
                graph_weights=(table.graph_name,),
                graph_biases=(head.bias,),
            )
        )


def _packed(parts: Sequence[str]) -> str:
    """Return the name of query, key and value together."""
    return f"{parts[0].rpartition('.')[0]}.qkv"


def _labels(config: Mapping[str, Any], build: _Builder, weight: str) -> tuple[str, ...]:
    """Return the names of a classifier's outputs.

    Raises:
        SourceError: The config names none although there are not the two that transformers assumes, or names another
            number of them than the head has rows.
    """
    rows = build.rows(weight)
    given = config.get("id2label")
    if given is None:
        # transformers leaves out what is its default: two labels without names.
        count = config.get("num_labels", rows if rows is not None else 2)
        if count not in (1, 2) or (rows is not None and rows != count):
            raise SourceError(
                "the classification head has no labels: config.json has no id2label",
                where=weight,
                hint='add "id2label": {"0": "NAME", ...} with a name for every output to config.json',
            )
        return tuple(f"LABEL_{index}" for index in range(count))
    if not isinstance(given, Mapping) or not 0 < len(given) <= _MAX_LABELS:
        raise SourceError("config.json: id2label names no labels", hint='"id2label": {"0": "NAME", ...}')
    try:
        names = {int(key): value for key, value in given.items()}
    except (TypeError, ValueError):
        names = {}
    if sorted(names) != list(range(len(given))) or not all(isinstance(name, str) and name for name in names.values()):
        raise SourceError(
            "config.json: id2label does not number its labels from 0 on", hint='"id2label": {"0": "NAME", ...}'
        )
    if rows is not None and rows != len(names):
        raise SourceError(
            f"the classification head has {rows} outputs, config.json names {len(names)} labels",
            where=weight,
            hint="give id2label one name for every output",
        )
    return tuple(names[index] for index in range(len(names)))
