"""Compare int4 decoders at equal bytes, in one run: how far each artifact is from the float32 checkpoint on a text.

    python tools/benchmark_accuracy.py CHECKPOINT --text FILE [--calibration-text FILE]
        [--ours "NAME=--profile x86-int4 --set KEY=VALUE"]... [--peers NAME...] [--artifact NAME=DIR]...
        [--append docs/benchmarks.md] [--json]

Contenders, all of the same checkpoint:
- ours: any number of recipes, each the options of a `compress export`, run as a process whose time and memory are
  measured; `{calibration}` among the options stands for the calibration text;
- the onnxruntime-genai builder's `default`, `rtn`, `k_quant` and `k_quant_mixed`: blocks of 32, accuracy level 4;
- Olive's `gptq`, and `gptq-mixed` with 8 bits where its k_quant_mixed puts them (olive_gptq.py has its settings);
- artifacts that exist already.

Every artifact is measured by the code of `compress validate`: onnxruntime on the CPU as the graph stands, the same
windows of the text for all, against the checkpoint in PyTorch float32. A peer's artifact is kept with `--keep` and
taken again if versions, options, checkpoint and text are the same; ours are always made anew.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accuracy_contenders import (
    ACCURACY_LEVEL,
    BUILDER,
    OLIVE,
    OLIVE_PINS,
    PEERS,
    Made,
    gather,
    given,
    ours,
    parse_named,
    sha256,
)
from measured_export import BUILDER_PINS, MB, Missing, default_cache, machine, model_bytes

from compress.errors import EXIT_OUTSIDE_BUDGET, CompressError

if TYPE_CHECKING:
    from compress.report.model import DecoderDrift
    from compress.validation.artifact import Artifact

#: A peer counts as of equal bytes if it is at most this much larger than ours: the benefit of the doubt is the peer's.
SLACK = 0.03


@dataclass(frozen=True)
class Row:
    """One artifact's figures: bytes, nats, shares, seconds; errors are ``None`` with a single window."""

    tool: str
    name: str
    bytes: int
    kl: float
    kl_error: float | None
    top1: float
    ratio: float
    ratio_error: float | None
    levels: tuple[int, ...]
    seconds: float | None = None
    peak: int | None = None
    exit_code: int = 0
    day: str | None = None


@dataclass(frozen=True)
class Pair:
    """One of ours and the best peer of its bytes; ``equal`` is false where every peer is larger: then the smallest."""

    ours: Row
    peer: Row
    equal: bool


# ------------------------------------------------------------------------------------------------------- measuring


def accuracy_levels(model: Path) -> tuple[int, ...]:
    """Return the different accuracy levels of a graph's MatMulNBits, 0 where one states none."""
    import onnx

    nodes = onnx.load(str(model), load_external_data=False).graph.node
    levels = {
        next((attribute.i for attribute in node.attribute if attribute.name == "accuracy_level"), 0)
        for node in nodes
        if node.op_type == "MatMulNBits"
    }
    return tuple(sorted(levels))


@contextlib.contextmanager
def with_head_size(artifact: Artifact) -> Iterator[Artifact]:
    """Yield the artifact with a graph whose cache inputs state their head size, as measuring it needs.

    The builder of onnxruntime-genai 0.18 names that dimension (``kv_cache_dim``) instead. Where it does, a copy of the
    graph that states the number, which changes no computation, stands beside the original meanwhile.

    Raises:
        CompressError: The file is no ONNX graph.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(artifact.model), load_external_data=False)
    except DecodeError as error:
        raise CompressError("the graph is not ONNX", where=str(artifact.model)) from error
    sizes = [
        value.type.tensor_type.shape.dim for value in graph.graph.input if value.name.startswith("past_key_values.")
    ]
    named = [dimensions[3] for dimensions in sizes if len(dimensions) == 4 and dimensions[3].HasField("dim_param")]
    if not named:
        yield artifact
        return
    config = artifact.config
    for dimension in named:
        dimension.dim_value = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    copy = artifact.directory / "with-head-size.onnx"
    try:
        onnx.save(graph, str(copy))
        yield dataclasses.replace(artifact, model=copy)
    finally:
        copy.unlink(missing_ok=True)


def row_of(made: Made, drift: DecoderDrift) -> Row:
    """Put an artifact's figures together."""
    return Row(
        tool=made.tool,
        name=made.name,
        bytes=model_bytes(made.directory),
        kl=drift.kl_divergence.mean,
        kl_error=drift.kl_divergence.standard_error,
        top1=drift.top1_agreement,
        ratio=drift.perplexity_ratio.value,
        ratio_error=drift.perplexity_ratio.standard_error,
        levels=accuracy_levels(made.directory / "model.onnx"),
        seconds=made.run.seconds if made.run else None,
        peak=made.run.tree if made.run else None,
        exit_code=made.run.exit_code if made.run else 0,
        day=made.day,
    )


def evaluate(
    contenders: Sequence[Made], source: Path, options: argparse.Namespace, scratch: Path
) -> tuple[list[Row | Missing], dict[str, Any]]:
    """Measure every artifact on the same windows; also return what is said of the text and the reference.

    Raises:
        CompressError: The text or the checkpoint cannot be read, or there is no room for the logits.
    """
    # Here and not above: what is large would count in the exports' memory, which are started by this process.
    from compress.validation.artifact import Artifact, open_artifact
    from compress.validation.protocol import CheckpointSpec
    from compress.validation.run import make_reference, measure_drift
    from compress.validation.speed import SpeedPlan

    def silent(stage: str, fraction: float) -> None:
        """Progress of minutes needs no bar."""

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    plan = SpeedPlan(threads=options.threads)
    # Of the model the reference needs the tokenizer and the vocabulary, which the checkpoint has.
    model = Artifact(source, source / "model.onnx", {}, config["vocab_size"], None)
    print("measuring: the checkpoint in PyTorch", file=sys.stderr)
    spec = CheckpointSpec(str(source))
    reference = make_reference(model, spec, options.text, options.tokens, options.window, plan, scratch, [], silent)
    rows: list[Row | Missing] = []
    facts: dict[str, Any] = {"windows": len(reference.windows), "window": options.window}
    for made in contenders:
        print(f"measuring: {made.tool} {made.name}", file=sys.stderr)
        try:
            with with_head_size(open_artifact(made.directory)) as artifact:
                drift, _, _ = measure_drift(artifact, "cpu", reference, plan, scratch, silent)
        except CompressError as error:
            rows.append(Missing(made.name, " ".join(error.render().split())))
            continue
        facts |= {"tokens": drift.tokens, "reference": drift.reference, "perplexity": drift.reference_perplexity}
        rows.append(row_of(made, drift))
    text = reference.eval_text
    return rows, facts | {"text": {"name": text.name, "sha256": text.sha256}}


def pairs(rows: Sequence[Row], slack: float = SLACK) -> list[Pair]:
    """Return for each of ours the peer with the lowest KL among those of at most ``1 + slack`` times its bytes."""
    peers = [row for row in rows if row.tool != "compress"]
    found = []
    for mine in (row for row in rows if row.tool == "compress"):
        fitting = [row for row in peers if row.bytes <= (1 + slack) * mine.bytes]
        if fitting:
            found.append(Pair(mine, min(fitting, key=lambda row: row.kl), True))
        elif peers:
            found.append(Pair(mine, min(peers, key=lambda row: row.bytes), False))
    return found


# ---------------------------------------------------------------------------------------------------------- report


def _with_error(value: float, error: float | None, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} +- {error:.{digits}f}"


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table, smallest artifact first."""
    lines = [
        "| tool | recipe | MB | KL | top-1 agreement | perplexity ratio | export, s | peak, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row.bytes, row.kl)):
        cells = [
            row.tool,
            f"`{row.name}`" + (" (outside its budget)" if row.exit_code == EXIT_OUTSIDE_BUDGET else ""),
            f"{row.bytes / MB:.1f}",
            _with_error(row.kl, row.kl_error, 4),
            f"{100 * row.top1:.1f} %",
            _with_error(row.ratio, row.ratio_error),
            "not measured" if row.seconds is None else f"{row.seconds:.0f}",
            "not measured" if row.peak is None else f"{row.peak / MB:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pair_table(found: Sequence[Pair]) -> str:
    """Return a Markdown table of ours beside the best peer of equal bytes."""
    lines = [
        "| ours | MB | KL | best peer of these bytes | MB | KL | KL, ours / peer's |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair in found:
        mine, other = pair.ours, pair.peer
        remark = "" if pair.equal else " (none so small; the smallest)"
        cells = [f"`{mine.name}`", f"{mine.bytes / MB:.1f}", f"{mine.kl:.4f}"]
        cells += [f"{other.tool} `{other.name}`{remark}", f"{other.bytes / MB:.1f}", f"{other.kl:.4f}"]
        lines.append(f"| {' | '.join(cells)} | {mine.kl / other.kl:.2f} |")
    return "\n".join(lines)


def versions(rows: Sequence[Row]) -> dict[str, str]:
    """Return the versions that matter: this environment's, and what the peers in the table were made with."""
    found = {"python": platform.python_version()}
    for package in ("compress-slm", "onnxruntime", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    for tool, pins in ((BUILDER, BUILDER_PINS), (OLIVE, OLIVE_PINS)):
        if any(row.tool == tool for row in rows):
            found[tool] = ", ".join(pin.replace("==", " ") for pin in pins)
    return found


def notes(rows: Sequence[Row], missing: Sequence[Missing]) -> list[str]:
    """Return what a reader of the table has to know: who is missing, what was made earlier, other accuracy levels."""
    lines = [f"Missing: `{entry.name}`: {entry.reason}" for entry in missing]
    lines += [f"`{row.name}` of {row.tool} was made earlier, on {row.day}, and kept" for row in rows if row.day]
    odd = [row for row in rows if row.levels != (ACCURACY_LEVEL,)]
    lines += [f"`{row.name}` of {row.tool} has MatMulNBits of accuracy levels {list(row.levels)}" for row in odd]
    if not odd:
        lines.append(f"Every MatMulNBits is at accuracy level {ACCURACY_LEVEL}, as it stands in the graphs")
    return lines


def section(document: dict[str, Any], rows: Sequence[Row], missing: Sequence[Missing]) -> str:
    """Return the Markdown section."""
    facts, day = document["facts"], document["date"]
    text, calibration = facts["text"], document["calibration_text"]
    lines = [f"### Accuracy for the bytes: {document['checkpoint']}, {day}", "", table(rows), ""]
    if found := pairs(rows):
        lines += [pair_table(found), ""]
        lines += [
            f"A peer is of equal bytes if it is at most {100 * SLACK:.0f} % larger; of those the one of least KL."
        ]
        lines += [""]
    lines += [
        f"- {facts['tokens']} scored tokens of {text['name']} (SHA-256 {text['sha256'][:12]}), "
        f"{facts['windows']} windows of {facts['window']}; reference: {facts['reference']}, "
        f"perplexity {facts['perplexity']:.3f}",
        "- KL in nats a token, standard errors clustered by window; MB are 10^6 bytes of model.onnx and its data; peak "
        "is the greatest sum of resident memory over the export's processes",
    ]
    if calibration:
        lines.append(f"- Calibration text: {calibration['name']} (SHA-256 {calibration['sha256'][:12]})")
    lines += [f"- Recipe `{name}`: `{recipe}`" for name, recipe in document["recipes"].items()]
    lines += [f"- {note}" for note in notes(rows, missing)]
    lines.append(f"- Machine: {document['machine']}; {document['threads']}")
    lines.append(f"- Versions: {'; '.join(f'{name} {version}' for name, version in document['versions'].items())}")
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ``recipes`` are ours, ``given`` the artifacts that exist already."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a local Hugging Face directory of a decoder")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text that all are measured on")
    parser.add_argument("--calibration-text", type=Path, help="UTF-8 text for Olive, and for ours as {calibration}")
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument(
        "--ours", action="append", default=[], metavar="NAME=OPTIONS", help="options of an export of ours"
    )
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS, help="default: all of them")
    parser.add_argument(
        "--artifact", action="append", default=[], metavar="NAME=DIR", help="also measure this artifact directory"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="of the measurement, not of the exports"
    )
    parser.add_argument("--keep", type=Path, help="folder for artifacts (default: a temporary one)")
    parser.add_argument(
        "--scratch", type=Path, help="where logits go, two gigabytes or so (default: a temporary folder)"
    )
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where the peers' environments are kept")
    parser.add_argument("--append", type=Path, help="add the result to this Markdown file")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the section")
    options = parser.parse_args(arguments)
    options.checkpoint = options.checkpoint.resolve()
    if not (options.checkpoint / "config.json").is_file():
        parser.error(f"{options.checkpoint} has no config.json")
    for path in (options.text, options.calibration_text):
        if path is not None and not path.is_file():
            parser.error(f"there is no text {path}")
    calibration = options.calibration_text = options.calibration_text and options.calibration_text.resolve()
    try:
        options.recipes = [ours(entry, options.checkpoint, calibration) for entry in options.ours]
        options.given = [given(entry) for entry in options.artifact]
    except ValueError as error:
        parser.error(str(error))
    names = [recipe.name for recipe in options.recipes] + [made.name for made in options.given] + options.peers
    if doubled := {name for name in names if names.count(name) > 1}:
        parser.error(f"two contenders are called {sorted(doubled)[0]!r}")
    if not names:
        parser.error("there is nothing to compare: give --ours, --peers or --artifact")
    return options


def main() -> None:
    options = parse()
    source: Path = options.checkpoint
    where = machine()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        kept = (options.keep or scratch / "artifacts").resolve()
        kept.mkdir(parents=True, exist_ok=True)
        calibration = options.calibration_text
        entries = gather(options.recipes, options.peers, source, calibration, options.cache.resolve(), kept, scratch)
        made = [entry for entry in entries if isinstance(entry, Made)] + options.given
        missing = [entry for entry in entries if isinstance(entry, Missing)]
        try:
            measured, facts = evaluate(made, source, options, scratch)
        except CompressError as error:
            raise SystemExit(error.render()) from error
    rows = [row for row in measured if isinstance(row, Row)]
    missing += [entry for entry in measured if isinstance(entry, Missing)]
    if not rows:
        raise SystemExit("\n".join(f"{entry.name}: {entry.reason}" for entry in missing))
    document = {
        "checkpoint": source.name,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": where,
        "threads": f"threads: {options.threads} in the measurement, "
        f"in the exports {os.environ.get('OMP_NUM_THREADS') or 'as many as each takes'}",
        "versions": versions(rows),
        "recipes": dict(parse_named(entry, "") for entry in options.ours),
        "calibration_text": calibration and {"name": calibration.name, "sha256": sha256(calibration)},
        "facts": facts,
        "rows": [dataclasses.asdict(row) for row in rows],
        "pairs": [{"ours": pair.ours.name, "peer": pair.peer.name, "equal": pair.equal} for pair in pairs(rows)],
        "missing": {entry.name: entry.reason for entry in missing},
    }
    result = section(document, rows, missing)
    print(json.dumps(document) if options.json else result)
    if options.append:
        with options.append.open("a", encoding="utf-8") as file:
            file.write(f"\n{result}")


if __name__ == "__main__":
    main()
