"""What an artifact says of its calibration: the text, how the bits were chosen, and a picture of the choice.

Made from an export's own calibration, or from what the manifest of an artifact kept of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.package.staging import write_file
from compress.report.allocation import summarize
from compress.report.frontier import frontier_svg
from compress.report.model import Allocation, Calibration
from compress.validation import text
from compress.validation.overlap import overlap

if TYPE_CHECKING:
    from compress.calibrate.decoder import DecoderCalibration

PICTURE_NAME = "allocation.svg"


@dataclass(frozen=True)
class Calibrated:
    """A decoder's calibration as reports need it.

    Attributes:
        record: What the manifest keeps of the text (:class:`compress.calibrate.decoder_texts.CalibrationText`).
        content: The text, to look for in the evaluation text; ``None`` where it is not known.
        allocation: How bits were chosen; ``None`` where the profile says them.
    """

    record: Mapping[str, Any]
    content: str | None = None
    allocation: Allocation | None = None

    def describe(self, evaluation: str | None) -> Calibration:
        """Return the report's entry, with what the evaluation text (``None``: nothing was measured) shares with it."""
        shared = None
        if evaluation is not None and self.content is not None:
            shared = overlap(self.content, evaluation)
        known = {key: self.record.get(key) for key in ("source", "name", "sha256", "tokens", "window", "seed")}
        return Calibration.model_validate({**known, "overlap": shared})

    def allocated(self, measured_kl: float | None) -> Allocation | None:
        """Return how bits were chosen, with what the artifact was measured to lose, nats a token."""
        return None if self.allocation is None else self.allocation.model_copy(update={"measured_kl": measured_kl})

    def draw(self, directory: Path, measured_kl: float | None = None) -> None:
        """Write the frontier's picture into an artifact's directory; without an allocation there is none."""
        allocation = self.allocated(measured_kl)
        if allocation is not None:
            write_file(directory / PICTURE_NAME, frontier_svg(allocation))


def of_export(calibration: DecoderCalibration) -> Calibrated:
    """Return an export's calibration, its text read and its bits chosen."""
    assert calibration.text is not None, "the text is read first"
    allocation, budget = None, calibration.profile.budget
    if calibration.allocation is not None:
        allocation = summarize(calibration.allocation, max_bytes=budget.max_bytes, max_kl=budget.max_kl)
    return Calibrated(calibration.text.record, calibration.text.content, allocation)


def of_manifest(record: Mapping[str, Any]) -> Calibrated | None:
    """Return what a manifest kept of a decoder's calibration, ``None`` where there was none.

    Of the text only the embedded one is known by content, as long as this Python has the same.
    """
    calibration = record.get("calibration")
    if not isinstance(calibration, Mapping) or "source" not in calibration.get("text", {}):
        return None  # an encoder's: sentences, of which nothing is reported
    found = Calibrated(calibration["text"])
    if record.get("allocation") is not None:
        found = replace(found, allocation=Allocation.model_validate(record["allocation"]))
    embedded = text.embedded("calibration")
    known = found.record["source"] == "text" and found.record.get("sha256") == embedded.sha256
    return replace(found, content=embedded.content) if known else found
