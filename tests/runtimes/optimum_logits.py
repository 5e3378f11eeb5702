"""Run artifacts in optimum's ONNX Runtime classes: ``python optimum_logits.py REQUEST.json OUTPUT.npz``.

REQUEST: ``{"models": [{"directory", "task", "ids"}], "tokens"}``; of model ``i`` the output has ``values_i`` (logits,
or token embeddings) and, of a decoder, ``tokens_i``, the greedy continuation. Runs on transformers 4, not on the
project's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForFeatureExtraction
from transformers import AutoTokenizer


def main(request: Path, output: Path) -> None:
    """Answer a request."""
    asked = json.loads(request.read_text())
    made = {}
    for index, item in enumerate(asked["models"]):
        AutoTokenizer.from_pretrained(item["directory"])
        ids = torch.tensor([item["ids"]])
        feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if item["task"] == "text-generation":
            model = ORTModelForCausalLM.from_pretrained(item["directory"])
            made[f"values_{index}"] = model(**feeds).logits.numpy()
            tokens = model.generate(**feeds, max_new_tokens=asked["tokens"], do_sample=False)
            made[f"tokens_{index}"] = tokens[0, ids.shape[1] :].numpy()
        else:
            model = ORTModelForFeatureExtraction.from_pretrained(item["directory"])
            if "token_type_ids" in model.input_names:
                feeds["token_type_ids"] = torch.zeros_like(ids)
            made[f"values_{index}"] = model(**feeds).last_hidden_state.numpy()
    np.savez(output, **made)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
