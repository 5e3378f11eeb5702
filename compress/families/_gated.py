"""Decoders of the Llama shape: RMSNorm, rotary attention with grouped key-value heads, gated SiLU feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.contracts import Decoder, Fold, Linear, Runner, SizeKeys, Slice, Table, TensorInfo, Vector
from compress.families._reading import (
    check_rope,
    check_shapes,
    dimension,
    expect,
    flag,
    heads,
    layer_count,
    number,
    position_count,
    rope_kind,
    rope_settings,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Rotary scalings whose cosine and sine tables do not depend on the length of the sequence at hand.
STATIC_ROPE = ("default", "linear", "llama3")
#: Two sets of factors, one for sequences within the original context and one beyond it ("su" is its first name).
LONG_ROPE = ("longrope", "su")
SIZES = SizeKeys(
    layers="num_hidden_layers",
    inner="intermediate_size",
    heads="num_attention_heads",
    kv_heads="num_key_value_heads",
    head_dim="head_dim",
)


@dataclass(frozen=True)
class GatedDecoder:
    """A family of the Llama shape; ``packed`` checkpoints (Phi-3) store QKV and gate/up as one tensor each."""

    model_type: str
    architectures: tuple[str, ...]
    genai_type: str
    packed: bool = False
    ropes: tuple[str, ...] = STATIC_ROPE
    sizes: SizeKeys = SIZES

    def describe(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Decoder:
        """Read the structure; see :class:`compress.contracts.Family`."""
        expect(config, "hidden_act", ("silu",), "silu")
        expect(config, "mlp_bias", (False,), False)
        expect({"rope_type": rope_kind(config)}, "rope_type", self.ropes, "default")
        # transformers 5 writes it into the rotary parameters, older ones beside them.
        for settings in (config, rope_settings(config)):
            expect(settings, "partial_rotary_factor", (1, None), 1)
        hidden, vocab = dimension(config, "hidden_size"), dimension(config, "vocab_size")
        query, key_value, head = heads(config)
        ffn = dimension(config, "intermediate_size")
        tied = flag(config, "tie_word_embeddings", False)
        check_rope(config, head)
        number(config, "rms_norm_eps", 1e-6, most=1.0)
        dimension(config, "sliding_window", 1)
        layers = layer_count(config, "num_hidden_layers")
        token = "model.embed_tokens.weight"
        linears = [linear for index in range(layers) for linear in self._block(config, index)]
        linears.append(
            Linear(
                name="lm_head",
                role="head",
                layer=None,
                out_features=vocab,
                in_features=hidden,
                weight=(Slice(token if tied else "lm_head.weight"),),
                graph_weights=(token if tied else "lm_head.weight",),
            )
        )
        norms = [
            f"model.layers.{index}.{norm}.weight"
            for index in range(layers)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]
        positions = position_count(config, "max_position_embeddings", max(1, head // 2))
        switch = _rope_switch(config, positions)
        decoder = Decoder(
            model_type=self.model_type,
            layers=layers,
            hidden_size=hidden,
            heads=query,
            kv_heads=key_value,
            head_dim=head,
            vocab_size=vocab,
            context_length=positions,
            tied=tied,
            tables=(Table("model.embed_tokens", vocab, hidden, Slice(token), token),),
            linears=tuple(linears),
            vectors=tuple(Vector(name, Slice(name), hidden) for name in [*norms, "model.norm.weight"]),
            genai_type=self.genai_type,
            folds=tuple(
                fold for index in range(layers) for fold in _folds(f"model.layers.{index}", query, key_value, head, ffn)
            ),
            rope_shape=(positions + (switch or 0), head // 2),
            rope_switch=switch,
        )
        return check_shapes(decoder, tensors)

    def forward(
        self, config: Mapping[str, Any], decoder: Decoder, tokens: npt.NDArray[np.int64], runner: Runner
    ) -> None:
        """Run one sequence; see :class:`compress.contracts.Family`.

        Rotary scalings and sliding windows are left out. Windows are longer than the few tokens that statistics need;
        scalings shift a linear's statistics by less than half of what other random tokens do.
        """
        import numpy as np

        from compress.calibrate.arithmetic import causal_attention, rms_norm, rotate, silu

        epsilon = float(config.get("rms_norm_eps", 1e-6))
        theta = float(rope_settings(config).get("rope_theta") or config.get("rope_theta") or 10000.0)
        hidden = runner.rows("model.embed_tokens", tokens)
        query_size, value_size = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
        for index in range(decoder.layers):
            block = f"model.layers.{index}"
            normed = rms_norm(hidden, runner.vector(f"{block}.input_layernorm.weight"), epsilon)
            qkv = runner.linear(f"{block}.self_attn.qkv_proj", normed)
            query, key, value = (
                part.reshape(len(tokens), -1, decoder.head_dim)
                for part in np.split(qkv, [query_size, query_size + value_size], axis=1)
            )
            mixed = causal_attention(rotate(query, theta), rotate(key, theta), value)
            hidden = hidden + runner.linear(f"{block}.self_attn.o_proj", mixed)
            normed = rms_norm(hidden, runner.vector(f"{block}.post_attention_layernorm.weight"), epsilon)
            gate, up = np.split(runner.linear(f"{block}.mlp.gate_up_proj", normed), 2, axis=1)
            hidden = hidden + runner.linear(f"{block}.mlp.down_proj", silu(gate) * up)
        runner.observe("lm_head", rms_norm(hidden, runner.vector("model.norm.weight"), epsilon))

    def _block(self, config: Mapping[str, Any], index: int) -> tuple[Linear, ...]:
        hidden, ffn = dimension(config, "hidden_size"), dimension(config, "intermediate_size")
        query, key_value, head = heads(config)
        block = f"model.layers.{index}"
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        sizes = (query * head, key_value * head, key_value * head)
        parts = tuple(f"{attention}.{part}_proj" for part in "qkv")
        if self.packed:
            ends = (sizes[0], sizes[0] + sizes[1], sum(sizes))
            qkv = tuple(
                Slice(f"{attention}.qkv_proj.weight", end - size, end) for size, end in zip(sizes, ends, strict=True)
            )
            gate_up_names: tuple[str, ...] = (f"{mlp}.gate_up_proj.weight",)
            gate_up: tuple[Slice, ...] = (Slice(gate_up_names[0], 0, 2 * ffn),)
        else:
            # With their lengths: a longer q_proj and a shorter k_proj would add up as well.
            qkv = tuple(Slice(f"{part}.weight", 0, size) for part, size in zip(parts, sizes, strict=True))
            gate_up_names = (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
            gate_up = tuple(Slice(name, 0, ffn) for name in gate_up_names)
        biased = flag(config, "attention_bias", False)
        qkv_biases = tuple(f"{part}.bias" for part in parts) if biased else ()
        output_bias = (f"{attention}.o_proj.bias",) if biased else ()

        def linear(name: str, role: Any, rows: int, columns: int, weight: tuple[Slice, ...], **more: Any) -> Linear:
            return Linear(name, role, index, rows, columns, weight, **more)

        return (
            linear(
                f"{attention}.qkv_proj",
                "qkv",
                sum(sizes),
                hidden,
                qkv,
                bias=tuple(Slice(name, 0, size) for name, size in zip(qkv_biases, sizes, strict=False)),
                graph_weights=tuple(f"{part}.weight" for part in parts),
                graph_biases=qkv_biases,
            ),
            linear(
                f"{attention}.o_proj",
                "attention_output",
                hidden,
                query * head,
                (Slice(f"{attention}.o_proj.weight"),),
                bias=tuple(map(Slice, output_bias)),
                graph_weights=(f"{attention}.o_proj.weight",),
                graph_biases=output_bias,
            ),
            linear(
                f"{mlp}.gate_up_proj",
                "gate_up",
                2 * ffn,
                hidden,
                gate_up,
                graph_weights=gate_up_names,
            ),
            linear(
                f"{mlp}.down_proj",
                "down",
                hidden,
                ffn,
                (Slice(f"{mlp}.down_proj.weight"),),
                graph_weights=(f"{mlp}.down_proj.weight",),
            ),
        )


def _folds(block: str, query: int, key_value: int, head: int, ffn: int) -> tuple[Fold, ...]:
    """Return what each linear's inputs come from: norms, value heads, the ungated half of the feed-forward."""
    attention, mlp = f"{block}.self_attn", f"{block}.mlp"
    values = (query + key_value) * head
    return (
        Fold(f"{attention}.qkv_proj", vectors=(f"{block}.input_layernorm.weight",)),
        Fold(
            f"{attention}.o_proj",
            producer=f"{attention}.qkv_proj",
            start=values,
            group=query // key_value,
            head_dim=head,
        ),
        Fold(f"{mlp}.gate_up_proj", vectors=(f"{block}.post_attention_layernorm.weight",)),
        Fold(f"{mlp}.down_proj", producer=f"{mlp}.gate_up_proj", start=ffn),
    )


def _rope_switch(config: Mapping[str, Any], positions: int) -> int | None:
    """Return the length up to which LongRoPE's short factors apply, ``None`` for any other rotary embedding.

    Source: Ding et al., "LongRoPE", arXiv 2402.13753; ``_compute_longrope_parameters`` of transformers.
    """
    if rope_kind(config) not in LONG_ROPE:
        return None
    scaling = rope_settings(config)
    for key in ("attention_factor", "short_mscale", "long_mscale"):
        expect(scaling, key, (None,), None)
    original = dimension({**scaling, **config}, "original_max_position_embeddings", positions)
    return original if original != positions else None
