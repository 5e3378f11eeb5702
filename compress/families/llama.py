"""Llama: TinyLlama, SmolLM2 and every other checkpoint of ``LlamaForCausalLM``."""

from __future__ import annotations

from compress.families._gated import GatedDecoder

FAMILY = GatedDecoder(model_type="llama", architectures=("LlamaForCausalLM",), genai_type="llama")
