"""A job: one model under one profile, what decides its outcome, what memory it takes, and its command line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress import checks, pipeline, resources
from compress.contracts import Encoder
from compress.errors import CompressError, UsageError
from compress.fleet.grid import Loaded, Pair
from compress.package import load_target, manifest
from compress.package.target import Wish
from compress.package.tree import sha256
from compress.planning import make_plan
from compress.profile import Profile, load_profile

#: What Python starts ``compress`` with, so that it ends with whoever started it; the words of the command follow.
LAUNCHER: tuple[str, ...] = ("-P", "-m", "compress.fleet.launch")
#: A source of more files is told apart by its first ones.
_MAX_SOURCE_FILES = 10_000


@dataclass(frozen=True)
class Texts:
    """Files that jobs read, each with its option of ``compress export``."""

    calibration_text: Path | None = None
    eval_text: Path | None = None
    eval_labels: Path | None = None

    def given(self) -> Iterable[tuple[str, Path]]:
        """Yield the options that were given, with their files."""
        for name in ("calibration_text", "eval_text", "eval_labels"):
            path = getattr(self, name)
            if path is not None:
                yield f"--{name.replace('_', '-')}", path


@dataclass(frozen=True)
class Job:
    """A model under a profile.

    Attributes:
        name: The job's, and its artifact's directory's.
        pair: Its entries in the grid.
        model: What to open.
        profile: The profile's name or file, as the command line takes it.
        texts: What it reads besides.
        seed: Seed of everything random.
        validate: Whether the artifact is measured.
        key: A SHA-256 over everything that decides the outcome; see :func:`make_jobs`.
        problem: Why it cannot be run at all.
    """

    name: str
    pair: Pair
    model: pipeline.ModelReference
    profile: str
    texts: Texts
    seed: int
    validate: bool
    key: str
    problem: CompressError | None = None

    @property
    def overrides(self) -> tuple[str, ...]:
        """Return the profile's overrides."""
        return tuple(self.pair.profile.overrides)

    def words(self, output: str, threads: int, max_memory: int | None) -> list[str]:
        """Return the words after ``compress`` that make the artifact at ``output``."""
        words = ["export", self.model.reference, "--profile", self.profile, "-o", output, "--json"]
        words += ["--seed", str(self.seed), "--threads", str(threads)]
        words += [word for change in self.overrides for word in ("--set", change)]
        words += [word for option, path in self.texts.given() for word in (option, str(path))]
        for option, value in (
            ("--adapter", self.model.adapter),
            ("--revision", self.model.revision),
            ("--task", self.model.task),
            ("--max-memory", max_memory),
        ):
            words += [] if value is None else [option, str(value)]
        return words if self.validate else [*words, "--no-validate"]


def make_jobs(loaded: Loaded, *, validate: bool) -> list[Job]:
    """Return a grid's jobs, in its order.

    A job's key covers the model's reference, the sizes and times of a local source's files, the resolved profile, the
    digests of the texts, the seed and the versions. What a hub's branch points to is not covered: name a revision.

    Raises:
        UsageError: A text cannot be read.
    """
    grid = loaded.grid
    texts = Texts(loaded.path(grid.calibration_text), loaded.path(grid.eval_text), loaded.path(grid.eval_labels))
    digests = {option: _digest(path) for option, path in texts.given()}
    shared = {"texts": digests, "seed": grid.seed, "validate": validate, "versions": manifest.tool_versions()}
    sources: dict[str, Any] = {}
    jobs = []
    for pair in loaded.pairs():
        entry = pair.model
        model = pipeline.ModelReference(
            loaded.reference(entry.model), loaded.path(entry.adapter), entry.revision, entry.task
        )
        profile = loaded.profile(pair.profile.profile)
        job = Job(pair.name, pair, model, profile, texts, grid.seed, validate, "")
        try:
            recipe = load_profile(profile, job.overrides).model_dump(mode="json")
            if entry.name not in sources:
                sources[entry.name] = [
                    model.resolved,
                    *(_stamp(path) for path in (Path(model.reference), model.adapter)),
                ]
        except CompressError as error:
            jobs.append(replace(job, problem=error))
            continue
        told = {
            **shared,
            "model": sources[entry.name],
            "revision": entry.revision,
            "task": entry.task,
            "profile": recipe,
        }
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        jobs.append(replace(job, key=key))
    return jobs


def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except CompressError as error:
        raise UsageError(f"a text of the grid cannot be read: {error.what}", where=str(path)) from None


def _stamp(path: Path | None) -> list[list[Any]] | None:
    """Return name, size and time of a local source's files, ``None`` of what is not local."""
    if path is None or not path.exists():
        return None
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    found = []
    for item in files[:_MAX_SOURCE_FILES]:
        state = item.stat()
        found.append([item.relative_to(path).as_posix(), state.st_size, state.st_mtime_ns])
    return [*found, [str(len(files)), 0, 0]]


def predicted_peak(job: Job, threads: int, limit: int | None = None) -> int:
    """Predict the most memory that a job's export takes, all its processes together, in bytes; reads only the config.

    A validation that does not fit ``limit`` bytes whole is counted as it will be run: in pieces.

    Raises:
        CompressError: The model cannot be read, the profile does not take it, or there is no such profile.
    """
    if job.problem is not None:
        raise job.problem
    profile = load_profile(job.profile, job.overrides)
    with job.model.open(config_only=True) as checkpoint:
        plan = make_plan(pipeline.left_by_pruning(checkpoint, profile), profile, checkpoint)
        checks.check_plan(plan, profile)
        prediction = resources.predict(plan, profile, threads)
        wish = Wish(checkpoint, plan, profile)
        targets = [load_target(name, where=f"profile {profile.name}") for name in profile.targets]
        packaging = max((item.needs(wish).memory for item in targets if item.applies(plan.structure)), default=0)
        needs = list(resources.by_step(prediction, packaging).values())
        if job.validate:
            whole, pieces = prediction.validation, prediction.validation_in_pieces
            needs.append(whole if pieces is None or limit is None or whole <= limit else pieces)
        if profile.prune.wanted:
            needs.append(_pruning(checkpoint, profile))
        if job.texts.eval_labels is not None and not isinstance(plan.structure, Encoder):
            raise UsageError(
                "labelled examples are for models with a task's head; this one writes text",
                hint="leave eval_labels out, or give such models a grid of their own",
            )
    return max(needs)


def _pruning(checkpoint: Any, profile: Profile) -> int:
    """Predict what removing parts takes."""
    from compress.prune.amounts import full
    from compress.prune.estimate import prune_bytes
    from compress.prune.run import check, prunable, reads_text

    amounts = check(checkpoint, profile)
    structure, _ = prunable(checkpoint)
    return prune_bytes(structure, profile, amounts, text=reads_text(profile, full(structure), amounts))
