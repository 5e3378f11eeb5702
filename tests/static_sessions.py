"""A static decoder's two graphs in ONNX Runtime's CPU provider, and what transformers says of the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from compress.validation.static_decoding import DECODE_NAME, StaticDecoder

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


def open_static(artifact: Path) -> StaticDecoder:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    names = ("model.onnx", DECODE_NAME)
    return StaticDecoder(
        *(ort.InferenceSession(artifact / name, options, providers=["CPUExecutionProvider"]) for name in names)
    )


def source_logits(directory: Path, ids: Ids) -> Logits:
    """Return transformers' logits ``[tokens, vocabulary]`` of one sequence ``[1, tokens]``, all at once."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        found: Logits = model(input_ids=torch.tensor(ids)).logits[0].numpy()
    return found


def divergence(first: Logits, second: Logits) -> float:
    """Return the mean over positions of KL(first || second), in nats."""

    def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))

    p, q = log_softmax(first), log_softmax(second)
    return float((np.exp(p) * (p - q)).sum(-1).mean())
