"""Llama: TinyLlama, SmolLM2 and every other checkpoint of ``LlamaForCausalLM``."""

from __future__ import annotations

from dataclasses import replace

from compress.families._gated import SIZES, GatedDecoder

FAMILY = GatedDecoder(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    genai_type="llama",
    sizes=replace(SIZES, heads_divide=True),
)
