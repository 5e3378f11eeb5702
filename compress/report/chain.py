"""The chain source -> pruned -> quantized: what every step contributed, and a picture of it."""

from __future__ import annotations

from collections.abc import Sequence

from compress.report.model import AnyDrift, AnySpeed, ChainStep, DecoderDrift, EncoderDrift
from compress.sizes import format_size

PICTURE_NAME = "pruning.svg"
_WIDTH, _ROW, _TOP, _LEFT, _BAR = 680, 86, 56, 120, 380

_STYLE = """
  svg { --surface: #fcfcfb; --text: #1f1f1d; --muted: #6b6a65; --size: #2a6fc9; --time: #c2410c; }
  @media (prefers-color-scheme: dark) {
    svg { --surface: #1a1a19; --text: #efeee9; --muted: #a3a29b; --size: #6aa5f0; --time: #fb923c; }
  }
  text { font: 13px system-ui, sans-serif; fill: var(--text); }
  .surface { fill: var(--surface); }
  .title { font-size: 16px; font-weight: 600; }
  .step { font-weight: 600; }
  .note { fill: var(--muted); }
  .size { fill: var(--size); }
  .time { fill: var(--time); }
"""


def step(
    name: str, nbytes: int, drift: AnyDrift | None, speed: AnySpeed | None, previous: ChainStep | None
) -> ChainStep:
    """Return a step with what it contributed to size and speed beside the one before it; the first has neither."""
    speedup = 1.0 if previous is None else None if speed is None else speed.speedup_vs_onnx_float
    before = None if previous is None else previous.speedup_vs_source
    return ChainStep.model_validate(
        {
            "step": name,
            "bytes": nbytes,
            "size_factor": None if previous is None else previous.bytes / nbytes,
            "speedup_vs_source": speedup,
            "speed_factor": None if speedup is None or before is None or previous is None else speedup / before,
            "drift": drift,
        }
    )


def lost(drift: AnyDrift | None) -> str:
    """Return what a step has lost since the source, in the measure of the model's task."""
    if isinstance(drift, DecoderDrift):
        return f"KL {drift.kl_divergence.mean:.4g}, perplexity ratio {drift.perplexity_ratio.value:.4g}"
    if isinstance(drift, EncoderDrift):
        if drift.cosine is not None:
            return f"cosine {drift.cosine.mean:.4f}, worst {drift.cosine.min:.4f}"
        if drift.label_agreement is not None:
            return f"same label {drift.label_agreement:.1%}"
    return ""


def chain_svg(chain: Sequence[ChainStep]) -> str:
    """Return the chain as a self-contained SVG, a bar for size and one for time a step."""
    largest = max(item.bytes for item in chain)
    slowest = max(1 / item.speedup_vs_source for item in chain if item.speedup_vs_source)
    height = _TOP + _ROW * len(chain) + 16
    body = [
        f'<rect class="surface" width="{_WIDTH}" height="{height}"/>',
        f'<text class="title" x="20" y="30">{" &#8594; ".join(item.step for item in chain)}</text>',
    ]
    for index, item in enumerate(chain):
        top = _TOP + index * _ROW
        body.append(f'<text class="step" x="20" y="{top + 26}">{item.step}</text>')
        width = _BAR * item.bytes / largest
        body.append(f'<rect class="size" x="{_LEFT}" y="{top + 8}" width="{width:.1f}" height="18" rx="3"/>')
        size = format_size(item.bytes)
        if item.size_factor is not None:
            size += f", {item.size_factor:.2f}x smaller"
        body.append(f'<text x="{_LEFT + width + 8:.1f}" y="{top + 22}">{size}</text>')
        if item.speedup_vs_source:
            width = _BAR / item.speedup_vs_source / slowest
            body.append(f'<rect class="time" x="{_LEFT}" y="{top + 30}" width="{width:.1f}" height="18" rx="3"/>')
            label = f"time, {item.speedup_vs_source:.2f}x as fast" if index else "time in float ONNX"
            body.append(f'<text x="{_LEFT + width + 8:.1f}" y="{top + 44}">{label}</text>')
        body.append(f'<text class="note" x="{_LEFT}" y="{top + 66}">{lost(item.drift)}</text>')
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<title>Size, time and loss: {', '.join(item.step for item in chain)}</title>",
        f"<style>{_STYLE}</style>",
        *body,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
