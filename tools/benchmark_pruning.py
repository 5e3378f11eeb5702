"""What pruning costs a model, by amount and algorithm: perplexity of a decoder, retrieval of an encoder.

``benchmark_pruning.py MODEL WORK --text EVAL [--calibration-text TEXT] --recipe "NAME: --ffn 0.2" ...``

Every recipe is what follows ``compress prune MODEL``; its checkpoint goes to ``WORK/NAME`` and is kept. A decoder's
``EVAL`` is a text (perplexity over windows of 512 tokens). An encoder's is a ``.jsonl`` of pairs, ``query`` and
``doc``: each query's rank of its own document among all, by the cosine of mean-pooled states, as mean reciprocal rank.
Both are measured in PyTorch float32, the source too; no time is told.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_WINDOW, _LONGEST, _BATCH = 512, 128, 64


def perplexity(directory: Path, text: str, tokens: int) -> float:
    """Return the perplexity of a decoder's directory on the first tokens of a text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(directory)(text[: 8 * tokens], add_special_tokens=False).input_ids
    windows = torch.tensor(ids[: min(tokens, len(ids)) // _WINDOW * _WINDOW]).reshape(-1, _WINDOW)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for window in windows:
            logits = model(window[None]).logits[0, :-1].log_softmax(-1)
            total -= float(logits.gather(1, window[1:, None]).sum())
    return float(np.exp(total / (windows.numel() - len(windows))))


def reciprocal_rank(directory: Path, pairs: list[dict[str, str]]) -> float:
    """Return the mean reciprocal rank of every query's own document."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModel.from_pretrained(directory)
    model.eval()
    queries, documents = (_embeddings(model, tokenizer, [pair[key] for pair in pairs]) for key in ("query", "doc"))
    scores = queries @ documents.T
    ranks = (scores > np.diagonal(scores)[:, None]).sum(axis=1) + 1
    return float((1 / ranks).mean())


def _embeddings(model: Any, tokenizer: Any, texts: list[str]) -> npt.NDArray[np.float32]:
    import torch

    order = np.argsort([len(text) for text in texts], kind="stable")
    found: dict[int, npt.NDArray[np.float32]] = {}
    for start in range(0, len(texts), _BATCH):
        some = order[start : start + _BATCH]
        given = tokenizer(
            [texts[index] for index in some],
            padding=True,
            truncation=True,
            max_length=_LONGEST,
            return_tensors="pt",
        )
        with torch.inference_mode():
            states = model(**given).last_hidden_state
        mask = given["attention_mask"].unsqueeze(-1)
        vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1).numpy()
        found |= dict(zip(some.tolist(), vectors, strict=True))
    return np.stack([found[index] for index in range(len(texts))])


def main() -> int:
    """Prune, measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--recipe", action="append", default=[], metavar="NAME: OPTIONS")
    parser.add_argument("--tokens", type=int, default=8192)
    given = parser.parse_args()
    ranked = given.text.suffix == ".jsonl"
    text = given.text.read_text(encoding="utf-8")
    pairs = [json.loads(line) for line in text.splitlines()] if ranked else []

    def measure(directory: Path) -> float:
        return reciprocal_rank(directory, pairs) if ranked else perplexity(directory, text, given.tokens)

    source = measure(given.model)
    print(f"| recipe | {'MRR' if ranked else 'perplexity'} | relative |\n|---|---|---|\n| source | {source:.4f} | |")
    for recipe in given.recipe:
        name, _, options = recipe.partition(":")
        output = given.work / name.strip()
        if not output.exists():
            command = [sys.executable, "-m", "compress", "prune", str(given.model), "-o", str(output), *options.split()]
            if given.calibration_text is not None and "--recover none" not in options:
                command += ["--calibration-text", str(given.calibration_text)]
            subprocess.run(command, check=True, stdout=sys.stderr)
        value = measure(output)
        print(f"| {options.strip()} | {value:.4f} | {value / source - 1:+.2%} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
