"""The document of a comparison, schema version 1, and what it is made from. Unknown keys are errors.

Times are seconds, sizes bytes, divergences nats, shares 0..1, as in the report.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.report.model import Report, Verdict
from compress.sizes import format_size
from compress.validation.losses import Losses

Judgement = Literal["better", "worse", "same", "within the errors", "not judged", "not comparable"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StoredTensor(_Strict):
    """How a weight is stored: ``bits`` a value, scales included; ``relative_error`` where the report has one."""

    name: str
    role: str
    layer: int | None
    storage: str
    bits: float
    bytes: int
    relative_error: float | None = None


class StoredFile(_Strict):
    """A file's size and digest, as the manifest has them."""

    bytes: int
    sha256: str


class SideSummary(_Strict):
    """Who a side is; ``kind`` says whether an artifact or only its report was given."""

    name: str
    kind: Literal["artifact", "report"]
    status: str | None
    source: str | None
    revision: str | None
    adapter: str | None
    task: str | None
    profile: str | None
    created: str | None
    artifact_bytes: int
    verdict: Verdict | None
    versions: dict[str, str]


class Side(SideSummary):
    """All that is compared of a side: beside the summary its profile, seed, digests, tensors and report.

    ``tensors`` are the report's, with errors; ``graph_tensors`` what the graph says, without. ``losses`` are a
    decoder's by position, or else ``no_losses`` says why there are none.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    seed: int | None = None
    resolved: dict[str, Any] = Field(default_factory=dict)
    source_files: dict[str, str] = Field(default_factory=dict)
    files: dict[str, StoredFile] = Field(default_factory=dict)
    tensors: tuple[StoredTensor, ...] = ()
    graph_tensors: tuple[StoredTensor, ...] = ()
    report: Report | None = None
    losses: Losses | None = None
    no_losses: str | None = None

    def summary(self) -> SideSummary:
        """Return who it is, without what it holds."""
        return SideSummary.model_validate({key: getattr(self, key) for key in SideSummary.model_fields})


class Difference(_Strict):
    """Something that is not the same on both sides; ``None`` where a side has none."""

    name: str
    a: str | None
    b: str | None


class Paired(_Strict):
    """B's losses minus A's, position by position: the mean with its standard error, in nats a token.

    ``runs`` of consecutive positions are the sample; B is worse beyond ``threshold``, better beyond its negative.
    """

    change: float
    standard_error: float
    runs: int
    threshold: float


class Measure(_Strict):
    """A measured value of both sides.

    ``a_error`` and ``b_error`` are standard errors. ``change`` is B minus A and ``ratio`` B over A, ``None`` where they
    cannot be compared; ``why`` then says the reason, as it does where nothing is judged, or not by ``paired``: losses
    position by position, which for perplexity are the logarithm of ``ratio``.
    """

    name: str
    unit: str
    a: float | None
    b: float | None
    a_error: float | None = None
    b_error: float | None = None
    better: Literal["lower", "higher"]
    change: float | None = None
    ratio: float | None = None
    judgement: Judgement
    why: str | None = None
    paired: Paired | None = None

    @property
    def shown_paired(self) -> str | None:
        """The change by position with its standard error; perplexity in percent."""
        if self.paired is None:
            return None
        change, error = self.paired.change, self.paired.standard_error
        if self.unit:
            return f"{change:+.4f} ± {error:.4f}"
        return f"{math.expm1(change):+.2%} ± {math.exp(change) * error:.2%}"

    @property
    def shown_a(self) -> str:
        """A's value with its error and unit."""
        return self._shown(self.a, self.a_error)

    @property
    def shown_b(self) -> str:
        """B's value with its error and unit."""
        return self._shown(self.b, self.b_error)

    def _shown(self, value: float | None, error: float | None) -> str:
        if value is None:
            return "-"
        if self.unit == "bytes":
            return format_size(value)
        if self.unit == "share":
            return f"{value:.2%}" + ("" if error is None else f" ± {error:.2%}")
        if self.unit in ("tokens/s", "ms", "s"):
            return f"{value:.4g} {self.unit}" if abs(value) < 9999.5 else f"{value:.0f} {self.unit}"
        return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


class TensorChange(_Strict):
    """A weight that is stored differently, or at another distance from the source's; ``None`` on the side without."""

    name: str
    role: str
    layer: int | None
    a: StoredTensor | None
    b: StoredTensor | None


class FileChange(_Strict):
    """A file that differs by digest, or that a side does not have."""

    name: str
    a_bytes: int | None
    b_bytes: int | None


class Comparison(_Strict):
    """B beside A.

    ``worse`` says in sentences in what B is worse, beyond the errors; ``not_compared`` what is missing. ``tensors`` are
    those that differ, of both reports or else of both graphs (``tensors_from``).
    """

    schema_version: Literal[1] = 1
    a: SideSummary
    b: SideSummary
    differences: tuple[Difference, ...]
    measures: tuple[Measure, ...]
    tensors_from: Literal["reports", "graphs"] | None
    tensors: tuple[TensorChange, ...]
    tensors_same: int
    files: tuple[FileChange, ...]
    not_compared: dict[str, str]
    worse: tuple[str, ...]
