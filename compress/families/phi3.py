"""Phi-3 and Phi-3.5: the Llama shape with packed QKV and gate/up tensors in the checkpoint."""

from __future__ import annotations

from compress.families._gated import GatedDecoder

FAMILY = GatedDecoder(model_type="phi3", architectures=("Phi3ForCausalLM",), genai_type="phi3", packed=True)
