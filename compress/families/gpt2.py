"""GPT-2 and its distillations: LayerNorm, learned positions, Conv1D weights stored ``[in, out]``, tied head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.contracts import Decoder, Fold, Linear, Role, SizeKeys, Slice, Table, TensorInfo, Vector
from compress.errors import SourceError
from compress.families._reading import (
    check_shapes,
    dimension,
    expect,
    kept_heads,
    layer_count,
    number,
    position_count,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from compress.contracts import FloatArray, Runner


class Gpt2:
    """``GPT2LMHeadModel``; the hub's own checkpoints lack the ``transformer.`` prefix, saved ones have it."""

    model_type = "gpt2"
    architectures = ("GPT2LMHeadModel",)
    sizes = SizeKeys(layers="n_layer", inner="n_inner", heads="n_head")

    def describe(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Decoder:
        """Read the structure; see :class:`compress.contracts.Family`."""
        expect(config, "activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
        expect(config, "scale_attn_weights", (True,), True)
        expect(config, "scale_attn_by_inverse_layer_idx", (False,), False)
        expect(config, "add_cross_attention", (False,), False)
        expect(config, "tie_word_embeddings", (True,), True)
        hidden, vocab = dimension(config, "n_embd"), dimension(config, "vocab_size")
        heads, layers = dimension(config, "n_head"), layer_count(config, "n_layer")
        if hidden % heads:
            raise SourceError(f"config.json: n_embd {hidden} is not a multiple of n_head {heads}")
        kept = kept_heads(config, heads)
        positions = position_count(config, "n_positions", hidden, 1024)
        number(config, "layer_norm_epsilon", 1e-5, most=1.0)
        prefix = "" if "wte.weight" in tensors else "transformer."
        linears = [linear for index in range(layers) for linear in _block(config, prefix, index)]
        linears.append(
            Linear(
                name="lm_head",
                role="head",
                layer=None,
                out_features=vocab,
                in_features=hidden,
                weight=(Slice(f"{prefix}wte.weight"),),
                graph_weights=("lm_head.weight",),
            )
        )
        norms = [
            f"h.{index}.{norm}.{kind}"
            for index in range(layers)
            for norm in ("ln_1", "ln_2")
            for kind in ("weight", "bias")
        ]
        decoder = Decoder(
            model_type=self.model_type,
            layers=layers,
            hidden_size=hidden,
            heads=kept,
            kv_heads=kept,
            head_dim=hidden // heads,
            vocab_size=vocab,
            context_length=positions,
            tied=True,
            tables=(
                Table("transformer.wte", vocab, hidden, Slice(f"{prefix}wte.weight"), "transformer.wte.weight"),
                Table(
                    "transformer.wpe",
                    positions,
                    hidden,
                    Slice(f"{prefix}wpe.weight"),
                    "transformer.wpe.weight",
                    "position",
                ),
            ),
            linears=tuple(linears),
            vectors=tuple(
                Vector(f"transformer.{name}", Slice(f"{prefix}{name}"), hidden)
                for name in [*norms, "ln_f.weight", "ln_f.bias"]
            ),
            # onnxruntime-genai's own "gpt2" type wants one combined past tensor; "decoder" is its generic type.
            genai_type="decoder",
            folds=tuple(
                fold for index in range(layers) for fold in _folds(f"transformer.h.{index}", hidden // heads * kept)
            ),
        )
        return check_shapes(decoder, tensors)

    def forward(
        self, config: Mapping[str, Any], decoder: Decoder, tokens: npt.NDArray[np.int64], runner: Runner
    ) -> None:
        """Run one sequence; see :class:`compress.contracts.Family`."""
        import numpy as np

        from compress.calibrate.arithmetic import causal_attention, gelu_tanh, layer_norm

        epsilon = float(config.get("layer_norm_epsilon", 1e-5))

        def norm(name: str, hidden: FloatArray) -> FloatArray:
            return layer_norm(hidden, runner.vector(f"{name}.weight"), runner.vector(f"{name}.bias"), epsilon)

        positions = np.arange(len(tokens), dtype=np.int64)
        hidden = runner.rows("transformer.wte", tokens) + runner.rows("transformer.wpe", positions)
        for index in range(decoder.layers):
            block = f"transformer.h.{index}"
            qkv = runner.linear(f"{block}.attn.qkv_proj", norm(f"{block}.ln_1", hidden))
            query, key, value = (part.reshape(len(tokens), -1, decoder.head_dim) for part in np.split(qkv, 3, axis=1))
            hidden = hidden + runner.linear(f"{block}.attn.o_proj", causal_attention(query, key, value))
            inner = gelu_tanh(runner.linear(f"{block}.mlp.up_proj", norm(f"{block}.ln_2", hidden)))
            hidden = hidden + runner.linear(f"{block}.mlp.down_proj", inner)
        runner.observe("lm_head", norm("transformer.ln_f", hidden))


def _folds(block: str, mixed: int) -> tuple[Fold, ...]:
    """Return what each linear's inputs come from; no scale passes through the feed-forward's GELU."""
    return (
        Fold(f"{block}.attn.qkv_proj", vectors=(f"{block}.ln_1.weight", f"{block}.ln_1.bias")),
        Fold(f"{block}.attn.o_proj", producer=f"{block}.attn.qkv_proj", start=2 * mixed),
        Fold(f"{block}.mlp.up_proj", vectors=(f"{block}.ln_2.weight", f"{block}.ln_2.bias")),
    )


def _block(config: Mapping[str, Any], prefix: str, index: int) -> tuple[Linear, ...]:
    hidden = dimension(config, "n_embd")
    inner = dimension(config, "n_inner", 4 * hidden)
    block, graph = f"{prefix}h.{index}", f"transformer.h.{index}"
    heads = dimension(config, "n_head")
    mixed = hidden // heads * kept_heads(config, heads)

    def linear(name: str, role: Role, rows: int, columns: int, stored: str, parts: tuple[str, ...]) -> Linear:
        # Query, key and value are thirds of one tensor, whatever is left of each.
        step, length = hidden if len(parts) > 1 else rows, rows // len(parts)
        bounds = [(part * step, part * step + length) for part in range(len(parts))]
        whole = mixed if role == "attention_output" and mixed < hidden else None
        return Linear(
            name=f"{graph}.{name}",
            role=role,
            layer=index,
            out_features=rows,
            in_features=columns,
            weight=tuple(
                Slice(f"{block}.{stored}.weight", start, stop, True, columns=whole, spare=step - length)
                for start, stop in bounds
            ),
            bias=tuple(Slice(f"{block}.{stored}.bias", start, stop, spare=step - length) for start, stop in bounds),
            graph_weights=tuple(f"{graph}.{part}.weight" for part in parts),
            graph_biases=tuple(f"{graph}.{part}.bias" for part in parts),
        )

    return (
        linear("attn.qkv_proj", "qkv", 3 * mixed, hidden, "attn.c_attn", tuple(f"attn.{p}_proj" for p in "qkv")),
        linear("attn.o_proj", "attention_output", hidden, mixed, "attn.c_proj", ("attn.o_proj",)),
        linear("mlp.up_proj", "up", inner, hidden, "mlp.c_fc", ("mlp.up_proj",)),
        linear("mlp.down_proj", "down", hidden, inner, "mlp.c_proj", ("mlp.down_proj",)),
    )


FAMILY = Gpt2()
