"""One decoder in a process of its own, timed on request: ``speed_worker.py REQUEST``, a JSON object.

benchmark_speed.py starts one for every contender and keeps it, so that rounds can be interleaved without loading again.
Once it has loaded and warmed up, it writes a line of facts; then it answers every line on its standard input with one
round's times, until there is no more. Whatever a library prints goes to standard error.

A contender in llama.cpp runs in another environment's Python: what both need stands here and imports nothing else.

Fairness. All get the same random token ids and nothing is sampled. A prompt is fed at once and only the last position's
logits are asked for, which a graph may not be able to leave out (``all_positions``). Then tokens follow one by one.
All write new positions into the cache that they have: ONNX Runtime's is bound as input and output, as onnxruntime-genai
binds it.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

#: A prompt is fed again until this has gone by: one run of a small model is too short to stand for a round.
PROMPT_SECONDS = 0.5
WARM_STEPS = 4
#: What llama.cpp takes in one piece unless told otherwise.
MICRO_BATCH = 512
_LOGGED = ("flash_attn  ", "flash attention was", "buffer size")


class Runner(Protocol):
    """A loaded decoder with one sequence."""

    all_positions: bool

    def reset(self) -> None:
        """Forget the sequence."""

    def feed(self, ids: Sequence[int]) -> None:
        """Append tokens and wait for the last one's logits."""

    def facts(self) -> dict[str, Any]:
        """Return what a reader of the figures should know of the runtime."""


def _positions(request: Mapping[str, Any]) -> int:
    """Return how many positions the cache is made for."""
    longest: int = max(request["prompts"])
    new: int = request["new"]
    return longest + max(new, WARM_STEPS)


class OnnxRunner:
    """A graph in plain ONNX Runtime on its CPU provider; ``entries`` are further settings of the session."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        import numpy as np
        import onnxruntime as ort

        from compress.validation.decoding import CachedDecoder

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads, options.inter_op_num_threads = request["threads"], 1
        for key, value in request["entries"].items():
            options.add_session_config_entry(key, value)
        session = ort.InferenceSession(request["model"], options, providers=["CPUExecutionProvider"])
        self._array, self._version = np.array, ort.__version__
        self._decoder = CachedDecoder(session, capacity=_positions(request))
        self.all_positions = not self._decoder.trims_logits

    def reset(self) -> None:
        self._decoder.reset()

    def feed(self, ids: Sequence[int]) -> None:
        self._decoder.feed(self._array([ids], "int64"), keep=1)

    def facts(self) -> dict[str, Any]:
        return {"runtime": f"onnxruntime {self._version}"}


class LlamaRunner:
    """A GGUF file in llama.cpp on the CPU, with its own defaults but for threads, context and batch.

    Raises:
        SystemExit: It cannot load or run the model.
    """

    all_positions = False

    def __init__(self, request: Mapping[str, Any]) -> None:
        import ctypes

        import llama_cpp

        self._llama, self._log = llama_cpp, []  # type: tuple[Any, list[str]]

        @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator,unused-ignore]
        def logged(level: int, text: bytes, data: Any) -> None:  # noqa: ANN401 - a C callback
            del level, data
            self._log.append(text.decode(errors="replace"))

        self._logged = logged  # the library keeps a bare pointer to it
        llama_cpp.llama_log_set(logged, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            request["model"].encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        longest = max(request["prompts"])
        settings.n_ctx = _positions(request)
        settings.n_batch, settings.n_ubatch = longest, min(longest, MICRO_BATCH)
        settings.n_threads = settings.n_threads_batch = request["threads"]
        self._context = self._model and llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot load {request['model']}:\n{''.join(self._log[-5:])}")
        self._token = llama_cpp.llama_token

    def reset(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def feed(self, ids: Sequence[int]) -> None:
        # A batch without a list of outputs, as this makes it, computes the last token's logits alone.
        tokens = (self._token * len(ids))(*ids)  # the batch points to them: they have to outlive it
        batch = self._llama.llama_batch_get_one(tokens, len(ids))
        if code := self._llama.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode of {len(ids)} tokens returned {code}:\n{''.join(self._log[-5:])}")
        self._llama.llama_get_logits_ith(self._context, -1)  # waits for them

    def facts(self) -> dict[str, Any]:
        lines = [line.strip() for line in "".join(self._log).splitlines()]
        return {
            "runtime": f"llama-cpp-python {self._llama.__version__}",
            "system": self._llama.llama_print_system_info().decode().strip(" |"),
            # Its log names the operators that read the attention's mask, whatever the setting says.
            "flash_attention": any("FLASH_ATTN_EXT" in line for line in lines),
            "log": [line for line in lines if any(word in line.lower() for word in _LOGGED)],
        }


def _timed(runner: Runner, ids: Sequence[int]) -> float:
    started = time.perf_counter()
    runner.feed(ids)
    return time.perf_counter() - started


def round_of(runner: Runner, request: Mapping[str, Any], seconds: float = PROMPT_SECONDS) -> dict[str, Any]:
    """Return one round: the seconds of every run of each prompt, and of every token after the first prompt."""
    ids = random.Random(0).choices(range(request["vocabulary"]), k=max(request["prompts"]) + request["new"])
    prefill: dict[str, list[float]] = {}
    for length in request["prompts"]:
        times = prefill.setdefault(str(length), [])
        while not times or sum(times) < seconds:
            runner.reset()
            times.append(_timed(runner, ids[:length]))
    runner.reset()
    runner.feed(ids[: request["prompts"][0]])
    return {"prefill": prefill, "decode": [_timed(runner, [token]) for token in ids[-request["new"] :]]}


def peak() -> int:
    """Return the most bytes this process has held so far; the kernel's ``ru_maxrss`` would count its parent's too."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    request = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = time.perf_counter()
    if not Path(request["model"]).is_file():
        raise SystemExit(f"there is no {request['model']}")
    kinds = {"onnx": OnnxRunner, "llama": LlamaRunner}  # type: dict[str, type[OnnxRunner] | type[LlamaRunner]]
    runner: Runner = kinds[request["kind"]](request)
    loaded = time.perf_counter() - started
    warm = dict(request) | {"new": WARM_STEPS}
    round_of(runner, warm, seconds=0)
    facts = runner.facts() | {"all_positions": runner.all_positions, "load_seconds": loaded}
    print(json.dumps(facts | {"peak_rss_bytes": peak()}), file=answers)
    for _ in sys.stdin:
        print(json.dumps(round_of(runner, request)), file=answers)


if __name__ == "__main__":
    main()
