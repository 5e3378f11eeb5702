"""``sweep.json``: what a sweep has done so far, and what came out; schema version 1.

It is the journal that a second run continues from, and the comparison that ``README.md`` and ``sweep.html`` show. A
field that is ``None`` was not measured. Times are seconds, sizes bytes, divergences nats, shares 0..1.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

SCHEMA_VERSION = 1

State = Literal["waiting", "running", "done", "failed", "refused"]
LossMeasure = Literal["kl", "cosine_distance", "label_disagreement"]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
#: A job's name is a directory's.
JobName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Loss(_Strict):
    """What an artifact lost against its source; 0 is nothing.

    ``kl``: nats a token (or item); ``cosine_distance``: 1 - the mean cosine of embeddings; ``label_disagreement``: the
    share of other labels. Two are comparable when ``measure``, ``text`` (the evaluation text's SHA-256) and ``items``
    (tokens or texts) are the same.
    """

    measure: LossMeasure
    value: float
    standard_error: float | None = None
    text: str
    items: int


class Timing(_Strict):
    """How fast an artifact is: a decoder's median decode rate, or an encoder's median latency at its main point.

    Two are comparable when ``unit``, ``work``, ``provider``, ``machine`` and ``threads`` are the same.
    """

    value: float
    unit: Literal["tokens/s", "ms"]
    work: str
    provider: str
    machine: str
    threads: int
    speedup_vs_pytorch: float | None = None
    speedup_vs_onnx_float: float | None = None


class Outcome(_Strict):
    """What a job left.

    ``status``, as the manifest has it, is ``built`` where nothing was validated. ``exit_code`` is what
    ``compress export`` ends with for it: 0, 3 or 4. ``reasons`` are the verdict's. ``digest`` is one SHA-256 over all
    files that are no measurements: the lines ``SHA256  NAME``, as ``sha256sum`` prints them, by name. ``model_bytes``
    are graph and weights, ``source_bytes`` the source's weights. ``peak_rss_bytes`` is the export's largest process.
    """

    status: Literal["built", "accepted", "rejected"]
    exit_code: int
    reasons: tuple[str, ...] = ()
    manifest_sha256: Sha256
    digest: Sha256
    model_bytes: int
    source_bytes: int | None = None
    loss: Loss | None = None
    timing: Timing | None = None
    peak_rss_bytes: int | None = None


class JobRecord(_Strict):
    """A model under a profile.

    ``key`` is a SHA-256 over everything that decides the outcome. ``exit_code`` is the last attempt's, negative for a
    signal's number, ``None`` where none ended. ``seconds`` is the last attempt's time. ``machine`` is the host that it
    ran on. The artifact is the directory of the job's name in the output.
    """

    name: JobName
    model: str
    profile: str
    overrides: tuple[str, ...] = ()
    key: str
    state: State = "waiting"
    attempts: int = 0
    exit_code: int | None = None
    error: str | None = None
    predicted_peak_bytes: int | None = None
    seconds: float | None = None
    machine: str | None = None
    outcome: Outcome | None = None

    @property
    def status(self) -> str:
        """Return the artifact's status, or the job's state where it left none."""
        return self.outcome.status if self.outcome is not None else self.state


class Best(_Strict):
    """The best of a model's artifacts that nobody rejected, by one measure; ``limit_bytes`` is what it stays under."""

    model: str
    what: Literal["smallest", "fastest", "most accurate"]
    limit_bytes: int | None = None
    job: JobName


class Sweep(_Strict):
    """All of it.

    ``complete``: every job is done, or has failed for good. ``at_once`` is the most jobs that shared a machine.
    ``validated``: artifacts were measured. ``versions`` are those of the libraries that decide bytes and numbers.
    ``jobs`` are the grid's, in its order; ``former`` those of earlier grids, whose artifacts are still there.
    """

    schema_version: Literal[1] = 1
    created: str | None = None
    grid: str
    complete: bool = False
    at_once: int = Field(default=1, ge=1)
    validated: bool = True
    versions: dict[str, str] = Field(default_factory=dict)
    jobs: tuple[JobRecord, ...]
    best: tuple[Best, ...] = ()
    former: tuple[JobRecord, ...] = ()

    @property
    def exit_code(self) -> int:
        """Return what ``compress sweep`` ends with: 1 where a job failed, 4 a provider, 3 a budget, else 0."""
        codes = {_code(job) for job in self.jobs}
        return next((code for code in (1, 4, 3) if code in codes), 0)

    def job(self, name: str) -> JobRecord:
        """Return a job by its name."""
        return next(job for job in self.jobs if job.name == name)


def _code(job: JobRecord) -> int:
    if job.outcome is not None:
        return job.outcome.exit_code
    return job.exit_code if job.state == "failed" and job.exit_code in (3, 4) else 1
