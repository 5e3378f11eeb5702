"""Prune, quantize, export to ONNX and prove it: from a Hugging Face checkpoint to a deployable artifact."""

__version__ = "0.1.0"
