"""One encoder in a process of its own: ``encoder_worker.py REQUEST.json``; the answer is one JSON line.

benchmark_encoder.py starts one for every measurement, so that no contender finds a warm allocator, thread pool or
library of another's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
Feed = Mapping[str, Ids]
#: From inputs to the model's outputs by name; only ``last_hidden_state`` and ``sentence_embedding`` are looked at.
Run = Callable[[Feed], dict[str, npt.NDArray[Any]]]
WARM_UP = 3


def load_onnx(model: str, threads: int) -> Run:
    """Return how to run an ONNX file on the CPU provider."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    wanted = [value.name for value in session.get_inputs()]
    names = [value.name for value in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(None, {name: feed[name] for name in wanted}), strict=True))


def load_torch(model: str, threads: int) -> Run:
    """Return how to run a checkpoint with transformers."""
    import torch
    from transformers import AutoModel

    torch.set_num_threads(threads)
    module = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    segments = "type_vocab_size" in module.config.to_dict()

    def run(feed: Feed) -> dict[str, npt.NDArray[Any]]:
        tensors = {
            name: torch.from_numpy(value) for name, value in feed.items() if segments or name != "token_type_ids"
        }
        with torch.inference_mode():
            return {"last_hidden_state": module(**tensors)[0].numpy()}

    return run


def feed_of(rows: list[list[int]]) -> dict[str, Ids]:
    """Return the inputs for rows of token ids of one length."""
    ids = np.array(rows, np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def latency(run: Run, request: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the milliseconds of single runs at every shape ``BATCHxSEQUENCE``, in order."""
    found: dict[str, list[float]] = {}
    for shape in request["shapes"]:
        batch, sequence = (int(part) for part in shape.split("x"))
        feed = feed_of(rows_of(request["ids"], batch, sequence))
        for _ in range(WARM_UP):
            run(feed)
        times: list[float] = []
        end = time.perf_counter() + request["seconds"]
        while len(times) < request["minimum"] or time.perf_counter() < end:
            started = time.perf_counter()
            run(feed)
            times.append(1000 * (time.perf_counter() - started))
        found[shape] = times
    return found


def rows_of(ids: list[int], batch: int, sequence: int) -> list[list[int]]:
    """Cut ``batch`` different rows of real tokens out of a text: first token, ``sequence - 2`` tokens, last token."""
    first, *middle, last = ids
    step = sequence - 2
    return [[first, *(middle[(row * step + at) % len(middle)] for at in range(step)), last] for row in range(batch)]


def embed(run: Run, request: Mapping[str, Any]) -> Vectors:
    """Return the vectors ``[N, H]`` of texts, one text a run: a range that is found at run time is each text's own."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(request["tokenizer"])
    tokenizer.no_padding()
    tokenizer.enable_truncation(request["max_length"])
    found = []
    for encoding in tokenizer.encode_batch(json.loads(Path(request["texts"]).read_text(encoding="utf-8"))):
        outputs = run(feed_of([encoding.ids]))
        if "sentence_embedding" in outputs:
            found.append(outputs["sentence_embedding"][0])
        else:
            hidden = next(
                (outputs[name] for name in ("last_hidden_state", "token_embeddings") if name in outputs), None
            )
            if hidden is None:
                raise SystemExit(f"no output to make a sentence's vector of: {', '.join(outputs)}")
            found.append(pool(hidden[0], request["pooling"]))
    return np.stack(found).astype(np.float32)


def pool(hidden: npt.NDArray[Any], mode: str) -> npt.NDArray[Any]:
    """Return one vector ``[H]`` of a text's token vectors ``[T, H]``, none of which is padding."""
    if mode == "cls":
        return np.asarray(hidden[0])
    return np.asarray(hidden.max(axis=0) if mode == "max" else hidden.mean(axis=0))


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run = {"onnx": load_onnx, "torch": load_torch}[request["kind"]](request["model"], request["threads"])
    if request["do"] == "latency":
        print(json.dumps(latency(run, request)))
    else:
        np.save(request["out"], embed(run, request))
        print("{}")


if __name__ == "__main__":
    main()
