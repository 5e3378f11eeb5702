"""Phi-3 and Phi-3.5: the Llama shape with packed QKV and gate/up tensors in the checkpoint; LongRoPE beyond 4k."""

from __future__ import annotations

from compress.families._gated import LONG_ROPE, STATIC_ROPE, GatedDecoder

FAMILY = GatedDecoder(
    model_type="phi3",
    architectures=("Phi3ForCausalLM",),
    genai_type="phi3",
    packed=True,
    ropes=(*STATIC_ROPE, *LONG_ROPE),
)
