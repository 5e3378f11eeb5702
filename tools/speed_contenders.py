"""What benchmark_speed.py compares: each contender is made here, or taken as it was made, or the reason is given.

Artifacts of ours and of the onnxruntime-genai builder are made as benchmark_accuracy.py makes them; ours are kept too,
as long as no source of the package changes. llama.cpp is compiled for this processor, once, in an environment of its
own.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import llama_gguf
from accuracy_contenders import Made, Recipe, identity, make, peer
from benchmark_accuracy import with_head_size
from encoder_contenders import last_line
from measured_export import Build, Missing, compress_command, model_bytes, pinned_python
from roofline import onnx_token_bytes

from compress.environments import cache_directory
from compress.errors import EXIT_OUTSIDE_BUDGET, CompressError

LLAMA_PINS = ("llama-cpp-python==0.3.36", "numpy==2.4.6")
LLAMA_CMAKE = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
AMX_HEADER = Path(__file__).with_name("amx_tile_config.h")
GROUPS = ("ours", "builder", "llama")
BUILDER_ALGORITHM = "default"


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        group: Whose it is, one of ``GROUPS``.
        name: Its name in the tables.
        kind: What speed_worker.py runs it with, ``onnx`` or ``llama``.
        python: The interpreter that has its runtime.
        model: The graph or GGUF file.
        bytes: Bytes on disk, a graph's data included.
        token_bytes: Bytes of weights that a decoded token reads, as they lie on disk.
        day: When it was made, if not in this call.
        entries: Entries of its session's configuration.
    """

    group: str
    name: str
    kind: str
    python: Path
    model: Path
    bytes: int
    token_bytes: int
    day: str | None = None
    entries: dict[str, str] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------ ours


def split_settings(text: str) -> tuple[str, list[str]]:
    """Split ``PROFILE,KEY=VALUE,...``; commas inside brackets belong to a value.

    Raises:
        ValueError: There is no profile, or a part is no ``KEY=VALUE``.
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    profile, *settings = (part.strip() for part in parts)
    wrong = [part for part in settings if not part.partition("=")[0].strip() or "=" not in part]
    if not profile or "=" in profile or wrong:
        raise ValueError(f"{text!r} is not PROFILE or PROFILE,KEY=VALUE,...")
    return profile, settings


def sources_digest() -> str:
    """Return what decides an artifact of ours beside the recipe: the package's sources and profiles, as a digest."""
    import compress

    root = Path(compress.__file__).parent
    digest = hashlib.sha256()
    for folder in (root, root.parent / "profiles"):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".toml")):
            digest.update(str(path.relative_to(root.parent)).encode() + path.read_bytes())
    return digest.hexdigest()


def ours(text: str, source: Path) -> Recipe:
    """Return the export of ``PROFILE,KEY=VALUE,...``."""
    profile, settings = split_settings(text)
    overrides = [word for setting in settings for word in ("--set", setting)]
    command = (*compress_command(), "export", str(source), "--profile", profile, *overrides)
    return Recipe(
        "compress", text, (*command, "--no-validate", "-o", "{out}"), (0, EXIT_OUTSIDE_BUDGET), (sources_digest(),)
    )


# ------------------------------------------------------------------------------------------------------- llama.cpp


def llama_build() -> Build:
    """Return how llama.cpp is compiled: from its sources, for this processor, around a fault of GCC's AMX header."""
    digest = hashlib.sha256(AMX_HEADER.read_bytes()).hexdigest()
    return Build(
        options=("--no-binary", "llama-cpp-python"),
        environment={"CMAKE_ARGS": LLAMA_CMAKE, "CXXFLAGS": f"-include {shlex.quote(str(AMX_HEADER))}"},
        known=(LLAMA_CMAKE, f"{AMX_HEADER.name} {digest[:12]}"),
    )


def llama_python() -> Path:
    """Return the interpreter of llama.cpp's environment, compiled on first use (a quarter of an hour on two cores).

    Raises:
        CalledProcessError: It cannot be made; pip has said why.
    """
    return pinned_python(cache_directory() / "llama.cpp", LLAMA_PINS, llama_build())


def llama(kind: str, source: Path, folder: Path, python: Path) -> Contender | Missing:
    """Write the checkpoint as a GGUF file, unless it is there and was made alike."""
    name = f"llama.cpp {kind}"
    out = folder / f"llama.cpp-{kind}"
    model, record = out / "model.gguf", out / "export.json"
    script = str(Path(llama_gguf.__file__))
    recipe = Recipe("llama.cpp", kind, (sys.executable, script, str(source), "{out}", "--type", kind))
    key = identity(recipe, source, None)
    day = None
    kept = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if kept.get("identity") == key:
        day = kept["day"]
    else:
        print(f"making: {name}", file=sys.stderr)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        command = [str(model) if word == "{out}" else word for word in recipe.command]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return Missing(name, last_line(done.stderr))
        today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        record.write_text(json.dumps({"identity": key, "day": today}), encoding="utf-8")
    read = llama_gguf.token_bytes(llama_gguf.sizes_of(model))
    return Contender("llama", name, "llama", python, model, model.stat().st_size, read, day)


# ---------------------------------------------------------------------------------------------------------- making


def graph(
    made: Made | Missing, group: str, name: str, entries: dict[str, str], stack: contextlib.ExitStack
) -> Contender | Missing:
    """Return an artifact as a contender; what its graph lacks to be run is there until ``stack`` is closed."""
    from compress.validation.artifact import open_artifact

    if isinstance(made, Missing):
        return Missing(name, made.reason)
    try:
        artifact = stack.enter_context(with_head_size(open_artifact(made.directory)))
    except CompressError as error:
        return Missing(name, " ".join(error.render().split()))
    size, read = model_bytes(made.directory), onnx_token_bytes(made.directory / "model.onnx")
    return Contender(group, name, "onnx", Path(sys.executable), artifact.model, size, read, made.day, entries)


def gather(
    options: argparse.Namespace, folder: Path, scratch: Path, stack: contextlib.ExitStack
) -> list[Contender | Missing]:
    """Make every contender that is wanted, one after the other."""
    source: Path = options.checkpoint
    wanted: Sequence[str] = options.only or GROUPS
    found: list[Contender | Missing] = []
    for text in options.profile if "ours" in wanted else ():
        made = make(ours(text, source), source, None, folder, scratch)
        found.append(graph(made, "ours", f"ours {text}", options.session, stack))
    if "builder" in wanted:
        recipe = peer(BUILDER_ALGORITHM, source, None, options.cache.resolve())
        made = recipe if isinstance(recipe, Missing) else make(recipe, source, None, folder, scratch)
        found.append(graph(made, "builder", "builder int4", {}, stack))
    if "llama" in wanted:
        try:
            python = llama_python()
        except subprocess.CalledProcessError as error:
            return [*found, Missing("llama.cpp", f"its environment cannot be made: {error}")]
        found += [llama(kind, source, folder, python) for kind in options.llama]
    return found
