"""Compare how fast decoders of one geometry run: our artifacts, the onnxruntime-genai builder's int4, and llama.cpp.

    python tools/benchmark_speed.py CHECKPOINT [--profile x86-int4 --profile arm-int4,quantize.block_size=64 ...]
        [--threads 2] [--prompt 128 --prompt 512] [--new 32] [--rounds 5] [--llama Q4_0] [--only ours ...]
        [--environment NAME=VALUE] [--work DIR] [--append docs/performance.md] [--json FILE]

CHECKPOINT is a local Hugging Face directory of a Llama, Mistral or Phi-3 kind; geometry.py writes ones whose
values are random: speed depends on the shape alone. Contenders:
- ours: what `compress export` makes under each profile; `PROFILE,KEY=VALUE,...` changes settings of it;
- the builder's int4 (blocks of 32, accuracy level 4), in an environment of its own;
- llama.cpp on a GGUF of the same shape in which every matrix has one type (llama_gguf.py), compiled on first use for
  this processor in an environment of its own.

Both ONNX contenders run in this environment's plain onnxruntime with the same session settings, unless `--session`
adds some to ours, and write into the cache that they have, as onnxruntime-genai does. `--environment` sets variables
for all contenders, llama.cpp too. Every contender has its own process, loads once, warms up and waits; then rounds are
interleaved and their order is turned about, so that a drift of the machine favours nobody, and ratios are taken within
a round. A round times each prompt and then `--new` tokens one by one behind the first of the prompts. What `--work`
keeps is used again as long as nothing it was made from has changed. Nothing else should run: what other processes had
of the processors meanwhile is measured and told.
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
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from benchmark_encoder import instructions
from benchmark_export import describe
from llama_gguf import ARCHITECTURES, TYPES
from measured_export import BUILDER_PINS, Missing, default_cache, machine, publish
from processor_time import Others
from roofline import last_level_cache, read_bandwidth
from speed_contenders import GROUPS, Contender, gather, split_settings
from speed_report import rates, section

#: Threads that wait for work spin for a while; the next contender shall not share the cores with them.
PAUSE_SECONDS = 0.3


# -------------------------------------------------------------------------------------------------------- measuring


class Worker:
    """A contender in its own process, loaded and warm.

    Raises:
        SystemExit: The process ended; the message has its last words.
    """

    def __init__(self, contender: Contender, options: argparse.Namespace, log: Path) -> None:
        self.name, self._log = contender.name, log
        request = {
            "kind": contender.kind,
            "model": str(contender.model),
            "threads": options.threads,
            "prompts": options.prompt,
            "new": options.new,
            "vocabulary": options.vocabulary,
            "entries": contender.entries,
        }
        script = Path(__file__).with_name("speed_worker.py")
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                [str(contender.python), str(script), json.dumps(request)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                env={**os.environ, **options.environment},
            )
        assert self._process.stdin and self._process.stdout
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self.pid = self._process.pid
        self.facts: dict[str, Any] = self._answer(self._answers)

    def _answer(self, answers: IO[str]) -> dict[str, Any]:
        line = answers.readline()
        if not line:
            self.close()
            code = self._process.returncode
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-8:])
            raise SystemExit(f"{self.name}: its process ended with exit code {code}\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def round(self) -> dict[str, Any]:
        """Return one round's seconds."""
        with contextlib.suppress(BrokenPipeError):  # that it has ended is seen at its answer
            self._requests.write("round\n")
            self._requests.flush()
        return self._answer(self._answers)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        self._answers.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start(
    contenders: Sequence[Contender], options: argparse.Namespace, scratch: Path, stack: contextlib.ExitStack
) -> tuple[list[Worker], list[Missing]]:
    """Start every contender's process, one after the other; those that cannot run are missing."""
    workers, missing = [], []
    for number, contender in enumerate(contenders):
        print(f"loading: {contender.name}", file=sys.stderr)
        try:
            worker = Worker(contender, options, scratch / f"worker-{number}.log")
        except SystemExit as error:
            missing.append(Missing(contender.name, " ".join(str(error).split())[-300:]))
            continue
        stack.callback(worker.close)
        workers.append(worker)
    return workers, missing


def measure(workers: Sequence[Worker], options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[float]]:
    """Return round -> contender -> its answer and ``others``, what others had of the processors; and bandwidths.

    The memory's rate is measured before the first round and after each: the machine's is the best of them.
    """
    found, bandwidths = [], [read_bandwidth(options.threads)]
    pids = [worker.pid for worker in workers]
    for number in range(options.rounds):
        answers = {}
        for worker in workers if number % 2 == 0 else list(reversed(workers)):
            time.sleep(PAUSE_SECONDS)
            others = Others(pids)
            answers[worker.name] = worker.round() | {"others": others.share()}
            told = ", ".join(f"{metric} {value:.1f}" for metric, value in rates(answers[worker.name]).items())
            taken = f"others had {answers[worker.name]['others']:.0%} of the processors"
            print(f"round {number + 1} of {options.rounds}: {worker.name}: {told} tokens/s; {taken}", file=sys.stderr)
        found.append(answers)
        bandwidths.append(read_bandwidth(options.threads))
    return found, bandwidths


# ----------------------------------------------------------------------------------------------------- command line


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ``vocabulary`` is the checkpoint's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a local Hugging Face directory of a decoder")
    parser.add_argument(
        "--profile", action="append", metavar="PROFILE[,KEY=VALUE]...", help="of ours (default: x86-int4)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, action="append", help="tokens of a prompt (default: 128 and 512)")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama", action="append", choices=TYPES, help="the GGUF's type (default: Q4_0)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="leave the others out")
    parser.add_argument(
        "--session", action="append", default=[], metavar="KEY=VALUE", help="an entry of our sessions' configuration"
    )
    parser.add_argument(
        "--environment", action="append", default=[], metavar="NAME=VALUE", help="a variable of all contenders"
    )
    parser.add_argument("--work", type=Path, help="folder that keeps artifacts (default: a temporary one)")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where the builder's environment is kept")
    parser.add_argument("--append", type=Path, help="add the result to this Markdown file")
    parser.add_argument("--json", type=Path, help="write every time into this file")
    options = parser.parse_args(arguments)
    options.checkpoint = options.checkpoint.resolve()
    options.profile = options.profile or ["x86-int4"]
    options.prompt = options.prompt or [128, 512]
    options.llama = options.llama or [TYPES[0]]
    if min(options.threads, options.new, options.rounds, *options.prompt) < 1:
        parser.error("threads, tokens and rounds are at least 1")
    for name in ("profile", "prompt", "llama"):
        if len(set(getattr(options, name))) < len(getattr(options, name)):
            parser.error(f"--{name}: the same twice")
    try:
        for text in options.profile:
            split_settings(text)
    except ValueError as error:
        parser.error(str(error))
    if any("=" not in entry for entry in options.session):
        parser.error("--session: write KEY=VALUE")
    if any("=" not in entry for entry in options.environment):
        parser.error("--environment: write NAME=VALUE")
    options.session = dict(entry.split("=", 1) for entry in options.session)
    options.environment = dict(entry.split("=", 1) for entry in options.environment)
    config_file = options.checkpoint / "config.json"
    if not config_file.is_file():
        parser.error(f"{options.checkpoint} has no config.json")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config.get("model_type") not in ARCHITECTURES:
        parser.error(f"{config.get('model_type')} is none of {', '.join(ARCHITECTURES)}, which all contenders can run")
    longest, most = max(options.prompt) + options.new, config["max_position_embeddings"]
    if longest > most:
        parser.error(f"{longest} tokens are more than the model's {most} positions")
    options.vocabulary = config["vocab_size"]
    return options


def versions() -> dict[str, str]:
    """Return the versions that matter: of this environment and of the peers'."""
    found = {"Python": platform.python_version()}
    for package in ("compress-slm", "onnxruntime", "mobius-onnx"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"builder": ", ".join(pin.replace("==", " ") for pin in BUILDER_PINS)}


def run(options: argparse.Namespace, scratch: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Make all contenders, time them and return the document.

    Raises:
        SystemExit: None of them can be made or run, or one ended on the way.
    """
    where = machine()
    folder = (options.work or scratch / "artifacts").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    entries = gather(options, folder, scratch, stack)
    contenders = [entry for entry in entries if isinstance(entry, Contender)]
    missing = [entry for entry in entries if isinstance(entry, Missing)]
    workers, failed = start(contenders, options, scratch, stack)
    missing += failed
    if not workers:
        raise SystemExit("\n".join(f"{entry.name}: {entry.reason}" for entry in missing))
    rounds, bandwidths = measure(workers, options)
    facts = {worker.name: worker.facts for worker in workers}
    kept = ("group", "kind", "bytes", "token_bytes", "day")
    return {
        "checkpoint": options.checkpoint.name,
        "input": describe(options.checkpoint),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": where,
        "instructions": instructions(),
        "threads": options.threads,
        "prompts": options.prompt,
        "new": options.new,
        "session": options.session,
        "environment": options.environment,
        "bandwidths": bandwidths,
        "cache": last_level_cache(),
        "versions": versions(),
        "contenders": {
            each.name: {key: dataclasses.asdict(each)[key] for key in kept} | facts[each.name]
            for each in contenders
            if each.name in facts
        },
        "missing": {entry.name: entry.reason for entry in missing},
        "rounds": rounds,
    }


def main() -> None:
    options = parse()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        document = run(options, scratch, stack)
    publish(section(document), options.append)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
