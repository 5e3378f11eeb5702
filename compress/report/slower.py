"""What a reader must know of an artifact that is slower than its source in float32: in what, by how much, what else.

Small is not fast: on most x86 processors, products with weights in blocks of 4 or 8 bits read a prompt more slowly than
float32 ones, however much faster they decode.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

from compress.report.model import AnySpeed, Speed

DECODES = "decodes"


@dataclass(frozen=True)
class Compared:
    """A kind of run (``reads a prompt of 128 tokens``), and how many times as fast as float32 ONNX it is."""

    what: str
    speedup: float


def measured(speed: AnySpeed) -> tuple[Compared, ...]:
    """Return what a report measured beside float ONNX, on the device itself; nothing where that was not."""
    if speed.evidence != "measured":
        return ()
    if isinstance(speed, Speed):
        found = [
            (prompt(speed.prompt_tokens), speed.prefill_speedup_vs_onnx_float),
            (DECODES, speed.speedup_vs_onnx_float),
        ]
    else:
        found = [(text(point.batch, point.length), point.speedup_vs_onnx_float) for point in speed.points]
    return tuple(Compared(what, ratio) for what, ratio in found if ratio is not None)


def prompt(tokens: int) -> str:
    """Return what a decoder does with a prompt."""
    return f"reads a prompt of {tokens} tokens"


def text(batch: int, length: int) -> str:
    """Return what an encoder does with texts."""
    return f"reads {batch} x {length} tokens"


def sentence(compared: Sequence[Compared]) -> str | None:
    """Return what is slower than float32 ONNX, and what is not; ``None`` where nothing is."""
    # As many digits as are shown: nobody is told of "1.00 times".
    slower = [item for item in compared if round(item.speedup, 2) < 1]
    if not slower:
        return None
    others = [item for item in compared if item not in slower]
    told = f"it {_listed(slower)} the speed of float32 ONNX"
    return f"{told}, and {_listed(others)}" if others else told


def _listed(items: Sequence[Compared]) -> str:
    return " and ".join(f"{item.what} at {item.speedup:.2f} times" for item in items)


def remedy(profile: str, *, blocks: bool, rotates: bool = False) -> str:
    """Return what to take instead: integer products where weights are in ``blocks`` now, else floats.

    Integer products lose least in a model that ``rotates``.
    """
    arm = platform.machine().lower() in ("aarch64", "arm64")
    integers = "arm-int8" if arm else "x86-int8-hybrid" if rotates else "x86-int8"
    if blocks and profile != integers:
        return f"where that counts, --profile {integers} multiplies integers"
    return "where that counts, take --profile float"
