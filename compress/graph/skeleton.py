"""Worker: build a model's graph without weights, in a process of its own.

Decoders come from mobius, encoders (those with a task) from :mod:`compress.graph.encoder_skeleton`. mobius, torch and
transformers take some 400 MB just to be imported; in another process they are gone before the first
weight is read, and the memory promise holds.

Called as ``python -m compress.graph.skeleton CONFIG_DIRECTORY OUTPUT.onnx [TASK]``. Weights come out as references to
external data that does not exist: names, types and shapes only. Tables that the skeleton computes itself (rotary cosine
and sine) come out with their values.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from compress import temporary
from compress.children import follow_parent, reason, require_room, run_module
from compress.errors import WorkerError

_TIMEOUT_SECONDS = 600
_LONGEST_REASON = 300


def build_skeleton(
    config_directory: Path, output: Path, task: str = "", *, environment: Mapping[str, str] | None = None
) -> None:
    """Run the worker on a directory that holds ``config.json`` and wait for ``output``.

    ``task`` is an encoder's (see :mod:`compress.tasks`), empty for a decoder.

    Raises:
        WorkerError: It failed or took too long; the message holds the last line of its log.
    """
    arguments = [str(config_directory.resolve()), str(output.resolve()), *([task] if task else [])]
    # One thread: nothing here is parallel.
    variables = {**(environment or {}), "OMP_NUM_THREADS": "1"}
    try:
        done = run_module("compress.graph.skeleton", *arguments, timeout=_TIMEOUT_SECONDS, environment=variables)
    except subprocess.TimeoutExpired:
        raise WorkerError(f"building the graph skeleton took more than {_TIMEOUT_SECONDS} s") from None
    if done.returncode or not output.is_file():
        log = done.stderr.strip()
        last = reason(log)[:_LONGEST_REASON] or f"exit {done.returncode}"
        require_room(log, output)
        failure = WorkerError(
            f"building the graph skeleton failed: {last}",
            where=str(config_directory / "config.json"),
            hint="check config.json; with --debug the worker's log is shown",
        )
        failure.add_note(f"The worker's log:\n{log}")  # a traceback shows it, the short message does not
        raise failure


def _work(config_directory: str, output: str, task: str = "") -> None:
    if task:
        from compress.graph import encoder_skeleton

        encoder_skeleton.write(config_directory, output, task)
        return
    import mobius
    import onnx_ir as ir

    from compress.graph.kept_heads import resized_config

    with temporary.directory("compress-skeleton-") as place:
        directory = resized_config(Path(config_directory), Path(place))
        # Without an explicit float32 a bfloat16 checkpoint silently gets an unfused attention on CPU.
        package = mobius.build(str(directory), load_weights=False, execution_provider="cpu", dtype="f32")
    model = package["model"]
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None
            assert value.shape is not None
            value.const_value = ir.ExternalTensor(
                location="not-written", offset=0, length=0, dtype=value.dtype, shape=value.shape, name=name
            )
    ir.save(model, output)


if __name__ == "__main__":
    follow_parent()
    _work(*sys.argv[1:])
