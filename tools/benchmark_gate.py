"""How often the two gates are wrong: budgets against the source, and `compress compare --fail-if-worse`.

    python tools/benchmark_gate.py CHECKPOINT --eval-text FILE --work DIR [--windows 64] [--trials 200] [--bugs]
        [--bench 40] [--json]

The checkpoint is exported twice, under `float` and `arm-int4`. Both run once over a pool of windows of the text, and
so do copies whose weights are changed until the pool's perplexity is a tenth and half a percent worse. A trial draws
windows, as many as a validation uses, and asks the product's own judges: `gate.judge` by the float profile's budgets,
and `compare` by both artifacts' losses on the same windows. Where B is to be as good as A, its losses are shifted to
A's mean.

`--bugs` plants the bugs of planted_bugs.py into the int4 artifact and asks both gates; `--bench` times the int4
artifact so many times and asks `compare` of every pair of neighbours and of any two. What ran once is kept in DIR.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import gate_pool
import numpy as np
import numpy.typing as npt
import planted_bugs
from gate_pool import Pool, Taken, add_noise, changed, move_codes, silent

from compress.profile import load_profile
from compress.report.compare import compare
from compress.report.compare_model import Side
from compress.report.environment import environment
from compress.report.model import (
    DecoderDrift,
    Divergence,
    Environment,
    Estimate,
    EvaluationText,
    Report,
    Size,
    Speed,
    Verdict,
)
from compress.validation import drift, run
from compress.validation.artifact import DECODING, open_artifact
from compress.validation.gate import judge
from compress.validation.losses import Losses
from compress.validation.on_provider import Terms
from compress.validation.speed import SpeedPlan, measure_speed

SIZES = (2048, 4096, 8192, 16384)
TARGET, MILD = 0.005, 0.001
#: How near the injected loss of perplexity must be to the target, as a share of it: budgets are far from theirs.
NEAR = {"float": 0.2, "int4": 0.1}
Chosen = npt.NDArray[np.int64]


# -------------------------------------------------------------------------------------------------------- candidates


def export(checkpoint: Path, profile: str, output: Path) -> Path:
    """Export without validation, unless it was done before."""
    if not (output / "manifest.json").is_file():
        words = [sys.executable, "-m", "compress", "export", str(checkpoint)]
        subprocess.run(
            [*words, "--profile", profile, "--no-validate", "-o", str(output)], check=True, stdout=sys.stderr
        )
    return output


def injected(
    pool: Pool, artifact: Path, name: str, base: Taken, change: Callable[[float], Callable[[Any], None]], first: float
) -> tuple[float, Taken]:
    """Return a candidate that costs about :data:`TARGET` of the pool's perplexity, and what it does cost.

    The loss grows about as the amount does (moved codes) or its square (noise): the secant through zero finds it.
    """
    amount, power = first, 2.0 if change is add_noise else 1.0
    for _ in range(8):
        make = change(amount)
        taken = pool.kept(f"{name}-{amount:g}", lambda make=make: changed(artifact, pool.scratch, make))  # type: ignore[misc]
        loss = float(np.expm1(taken.against(base)))
        print(f"{name}: {amount:g} costs {loss:+.3%} of perplexity", file=sys.stderr, flush=True)
        if abs(loss / TARGET - 1) <= NEAR[name]:
            return loss, taken
        factor = float(np.clip(TARGET / max(loss, TARGET / 10), 0.2, 5)) ** (1 / power)
        amount = float(f"{amount * factor:.4g}")
    raise SystemExit(f"{name}: no change costs {TARGET:.1%}")


def scaled(taken: Taken, base: Taken, share: float) -> Taken:
    """Return a candidate whose losses are shifted so that it is worse than the base by ``share`` of what it was.

    At 0 it is as good as the base, and what is left is the noise of a change. A change of weights cannot be made so
    small: where activations are rounded to int8, any change at all is as noisy.
    """

    def moved(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[Any]:
        by: float = (1 - share) * (one.mean(dtype=np.float64) - other.mean(dtype=np.float64))
        return np.asarray(one - by, one.dtype)

    return replace(
        taken,
        nll=moved(taken.nll, base.nll),
        kl=moved(taken.kl, base.kl),
        difference=moved(taken.difference, base.difference),
    )


# ------------------------------------------------------------------------------------------------------------ trials


def report(found: DecoderDrift | None, *, verdict: Verdict | None = None, speed: Sequence[Speed] = ()) -> Report:
    """Return a report with what a comparison reads."""
    return Report(
        verdict=verdict or Verdict(status="pass"),
        size=Size(artifact_bytes=1),
        drift=found,
        speed=tuple(speed),
        environment=here(),
    )


@cache
def here() -> Environment:
    """Return this machine; asking it takes longer than a comparison."""
    return environment()


def side(made: Report, losses: Losses | None = None) -> Side:
    """Return a side of a comparison."""
    return Side(
        name="candidate", kind="report", status=None, source=None, revision=None, adapter=None, task=DECODING,
        profile=None, created=None, artifact_bytes=1, verdict=made.verdict, versions={}, report=made, losses=losses,
        no_losses=None if losses else "they were left out",
    )  # fmt: skip


def drawn(pool: Pool, taken: Taken, chosen: Chosen, *, paired: bool) -> Side:
    """Return a candidate as the report of a validation on some windows has it."""
    nll, kl = taken.nll[chosen].astype(np.float64), taken.kl[chosen].astype(np.float64)
    difference = taken.difference[chosen]
    error = float(difference.std(ddof=1) / np.sqrt(len(chosen)))
    ratio, reference = float(np.exp(difference.mean())), float(np.exp(nll.mean() - difference.mean()))
    found = DecoderDrift(
        provider="cpu",
        tokens=nll.size,
        windows=len(chosen),
        eval_text=EvaluationText(name=pool.text.name, sha256=pool.text.sha256),
        reference="PyTorch float32",
        reference_perplexity=reference,
        perplexity_ratio=Estimate(value=ratio, standard_error=ratio * error),
        kl_divergence=Divergence(
            mean=float(kl.mean()), standard_error=drift.clustered_error(kl), p99=float(np.quantile(kl, 0.99))
        ),
        top1_agreement=float(taken.top1[chosen].mean()),
        confident_tokens=0,
        confident_flips=0,
        logit_max_abs=0.0,
    )
    return side(report(found), pool.losses(taken, chosen) if paired else None)


def shares(pool: Pool, tokens: int, trials: int, fails: Callable[[Chosen], bool], seed: int = 0) -> float:
    """Return the share of trials that fail, each on its own draw of windows."""
    random = np.random.default_rng([seed, tokens])
    count, length = pool.windows.shape
    return sum(fails(random.integers(0, count, tokens // length)) for _ in range(trials)) / trials


def against_budget(taken: Taken, budgets: dict[str, float | None], chosen: Chosen) -> bool:
    """Return whether the budgets' gate fails a candidate on some windows."""
    numbers = {
        "kl": float(taken.kl[chosen].mean(dtype=np.float64)),
        "top1_agreement": float(taken.top1[chosen].mean()),
        "perplexity_ratio": float(np.exp(taken.difference[chosen].mean())),
    }
    return judge(budgets, numbers, task=DECODING).status == "fail"


def is_worse(pool: Pool, a: Taken, b: Taken, paired: bool, chosen: Chosen) -> bool:
    """Return whether `compare` calls candidate ``b`` worse than ``a`` on some windows."""
    return bool(compare(drawn(pool, a, chosen, paired=paired), drawn(pool, b, chosen, paired=paired)).worse)


def correlation(values: npt.NDArray[np.float64], lags: Sequence[int]) -> dict[int, float]:
    """Return the autocorrelation of ``[windows, positions]`` at some lags."""
    centred = values - values.mean()
    power = float((centred**2).mean())
    return {lag: float((centred[:, lag:] * centred[:, :-lag]).mean() / power) for lag in lags}


def errors_by_run(a: Taken, b: Taken, runs: Sequence[int]) -> dict[str, dict[int, float]]:
    """Return the standard errors of both differences over the pool by the length of a run, in nats a token."""
    from compress.report.compare_paired import paired

    pairs = {"nll": (a.nll, b.nll), "kl": (a.kl, b.kl)}
    found: dict[str, dict[int, float]] = {}
    for name, (one, other) in pairs.items():
        results = {run: paired(one, other, run=run) for run in runs}
        found[name] = {run: item.standard_error for run, item in results.items() if item is not None}
    return found


def compare_gate(pool: Pool, base: Taken, candidates: dict[str, Taken], trials: int) -> dict[str, Any]:
    """Return by candidate and tokens how often `compare` fails it: by position, and by two standard errors."""
    found: dict[str, Any] = {}
    for name, taken in candidates.items():
        for paired in (True, False):
            found[f"{name}, {'by position' if paired else 'two standard errors'}"] = {
                tokens: shares(pool, tokens, trials, partial(is_worse, pool, base, taken, paired)) for tokens in SIZES
            }
    return found


# -------------------------------------------------------------------------------------------------------------- bugs


def planted(checkpoint: Path, artifact: Path, work: Path, bugs: Sequence[planted_bugs.Bug]) -> dict[str, Any]:
    """Return what both gates say of every bug in the artifact, validated as `arm-int4` validates (2,048 tokens)."""
    profile = load_profile("arm-int4")
    budgets: dict[str, float | None] = {
        name: limit for name, limit in profile.budget.model_dump().items() if not name.startswith("min_speedup")
    }
    place = work / "bugs"
    place.mkdir(exist_ok=True)
    opened, measure = open_artifact(artifact), profile.validation
    reference = run.make_reference(
        opened,
        run.CheckpointSpec(str(checkpoint)),
        None,
        measure.tokens,
        measure.window,
        gate_pool.PLAN,
        place,
        [],
        silent,
    )

    def validated(directory: Path) -> tuple[Side, run.Measured]:
        measured = run.Measured()
        run.measure_graph(open_artifact(directory), "cpu", reference, measured, gate_pool.PLAN, place, [], silent)
        verdict, _ = run.verdicts(budgets, {"cpu": measured}, 1, Terms())
        found = measured.drift if isinstance(measured.drift, DecoderDrift) else None
        return side(report(found, verdict=verdict), measured.losses), measured

    good, _ = validated(artifact)
    found: dict[str, Any] = {"none": _caught(good, good)}
    for bug in bugs:
        broken = changed(artifact, work / "candidate", bug)
        found[bug.__name__] = _caught(good, validated(broken.directory)[0])
        print(bug.__name__, json.dumps(found[bug.__name__]), file=sys.stderr, flush=True)
    return found


def _caught(good: Side, other: Side) -> dict[str, Any]:
    assert other.report is not None
    loss = other.report.drift
    assert loss is None or isinstance(loss, DecoderDrift)
    return {
        "kl": None if loss is None else loss.kl_divergence.mean,
        "decode_self_kl": None if loss is None or loss.decode is None else loss.decode.self_kl_mean,
        "budget": list(other.report.verdict.reasons),
        "compare": list(compare(good, other).worse),
    }


# ------------------------------------------------------------------------------------------------------------- speed


def timed(artifact: Path, work: Path, runs: int, threads: int) -> list[Speed]:
    """Time an artifact as `compress bench` does, so many times; those of earlier calls count."""
    path = work / f"speed-{threads}.jsonl"
    plan = SpeedPlan(threads=threads, repeats=3)
    lines = path.read_text().splitlines() if path.is_file() else []
    while len(lines) < runs:
        speed = measure_speed(open_artifact(artifact), "cpu", {}, plan)
        lines.append(speed.model_dump_json())
        path.write_text("\n".join(lines) + "\n")
    return [Speed.model_validate_json(line) for line in lines[:runs]]


def speed_gate(speeds: Sequence[Speed]) -> dict[str, Any]:
    """Return how often `compare` calls a run of the same artifact slower: the run after, and any other run."""
    sides = [side(report(None, speed=[speed])) for speed in speeds]
    neighbours = [(one, one + 1) for one in range(len(sides) - 1)]
    every = [(one, other) for one in range(len(sides)) for other in range(len(sides)) if one != other]
    found: dict[str, Any] = {"medians": [speed.decode_tokens_per_second.median for speed in speeds]}
    for name, pairs in (("neighbours", neighbours), ("any two", every)):
        worse = [bool(compare(sides[one], sides[other]).worse) for one, other in pairs]
        found[name] = {"pairs": len(pairs), "false_alarms": sum(worse) / len(pairs)}
    return found


# -------------------------------------------------------------------------------------------------------------- main


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Run what was asked for."""
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    artifacts = {name: export(options.checkpoint, name, work / name) for name in ("float", "arm-int4")}
    int4 = artifacts["arm-int4"]
    found: dict[str, Any] = {"environment": environment().model_dump(mode="json")}
    if options.bench:
        found["speed"] = speed_gate(timed(int4, work, options.bench, options.threads))
    if options.bugs:
        bugs = (*planted_bugs.WEIGHTS, *planted_bugs.GRAPH, *planted_bugs.CACHE, *planted_bugs.RELATIVES)
        found["bugs"] = planted(options.checkpoint, int4, work, bugs)
    if options.windows:
        found |= pooled(options, artifacts)
    return found


def pooled(options: argparse.Namespace, artifacts: dict[str, Path]) -> dict[str, Any]:
    """Return the trials of both gates."""
    int4 = artifacts["arm-int4"]
    pool = Pool(
        int4, options.checkpoint, options.eval_text, windows=options.windows, length=options.length, work=options.work
    )
    exact = pool.kept("float", lambda: open_artifact(artifacts["float"]))
    base = pool.kept("int4", lambda: open_artifact(int4))
    one = pool.kept("int4-one-thread", lambda: open_artifact(int4), threads=1, chunks=1)
    found: dict[str, Any] = {
        "windows": list(pool.windows.shape),
        "float": {"kl": float(exact.kl.mean()), "perplexity_ratio": float(np.exp(exact.difference.mean()))},
        "int4": {"kl": float(base.kl.mean()), "perplexity_ratio": float(np.exp(base.difference.mean()))},
        "threads_change_bits": not np.array_equal(one.nll, base.nll[: len(one.nll)]),
    }
    loss, noisy = injected(pool, artifacts["float"], "float", exact, add_noise, 0.0094)
    budgets: dict[str, float | None] = load_profile("float").budget.model_dump()
    tested = {"the same": exact, f"{loss:+.2%}": noisy, "+0.10%": scaled(noisy, exact, MILD / loss)}
    found["budget"] = {
        name: {
            tokens: shares(pool, tokens, options.trials, partial(against_budget, taken, budgets)) for tokens in SIZES
        }
        for name, taken in tested.items()
    }
    loss, worst = injected(pool, int4, "int4", base, move_codes, 0.001818)
    candidates = {"the same": base, f"{loss:+.2%}": worst} | {
        f"shifted to {wanted:+.2%}": scaled(worst, base, wanted / loss) for wanted in (0.0, MILD, TARGET)
    }
    found["compare"] = compare_gate(pool, base, candidates, options.trials)
    lags, runs = (1, 2, 4, 8, 16, 32, 64, 128), (1, 4, 8, 16, 32, 64, 128, 511)
    found["autocorrelation"] = {
        name: correlation(getattr(worst, name).astype(np.float64) - getattr(base, name), lags) for name in ("nll", "kl")
    }
    found["errors_by_run"] = errors_by_run(base, worst, runs)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--eval-text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64, help="of the pool; 0 leaves the trials out")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bench", type=int, default=0)
    parser.add_argument("--bugs", action="store_true")
    options = parser.parse_args(arguments)
    print(json.dumps(measured(options), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
