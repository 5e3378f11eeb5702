"""Mistral: Zephyr and other fine-tunes. The sliding window is an attribute of the attention node, the cache is full."""

from __future__ import annotations

from compress.families._gated import GatedDecoder

FAMILY = GatedDecoder(model_type="mistral", architectures=("MistralForCausalLM",), genai_type="mistral")
