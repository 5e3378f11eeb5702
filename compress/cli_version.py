"""``compress --version``: compress itself, and what decides the bytes and the numbers."""

from __future__ import annotations

import platform
from importlib import metadata

import click

from compress import __version__

#: Distributions whose version matters, and what of compress needs them where it works without.
_LIBRARIES = (
    ("onnxruntime", ""),
    ("onnx", ""),
    ("onnx-ir", ""),
    ("onnxscript", ""),
    ("mobius-onnx", ""),
    ("torch", ""),
    ("transformers", ""),
    ("optimum", ""),
    ("numpy", ""),
    ("safetensors", ""),
    ("tokenizers", ""),
    ("gguf", ""),
    ("huggingface_hub", ""),
    ("onnxruntime-genai", "the genai extra"),
    ("onnxruntime-ep-openvino", "the openvino extra"),
    ("onnxruntime-qnn", "the qnn extra"),
)


def version_text() -> str:
    """Return a line for compress, which scripts read, then one a library; none of them is imported."""
    lines = [f"compress, version {__version__}", f"  {'python':<24}{platform.python_version()}"]
    for name, extra in _LIBRARIES:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = f"not installed ({extra})" if extra else "not installed"
        lines.append(f"  {name:<24}{found}")
    return "\n".join(lines)


def _show(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        click.echo(version_text())
        context.exit()


version_option = click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show,
    help="Show the versions of compress and of the libraries that matter, and exit.",
)
