"""Calibration of a decoder: texts, what each weight's errors cost, an assignment of bits, and weights rounded with it.

The work is done block by block in a worker (:mod:`compress.calibrate.decoder_worker`); this is the side that asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compress import assign
from compress.calibrate.decoder_texts import CalibrationText, calibration_windows
from compress.contracts import Checkpoint, Decoder, Scheme
from compress.errors import UsageError
from compress.kept import Kept
from compress.package.staging import sync
from compress.planning import Plan, make_plan
from compress.profile import Profile
from compress.quantize import load_quantizer
from compress.quantize.allocate import Allocation
from compress.store import AnyArray
from compress.validation.protocol import Json, run_worker

TIMEOUT_SECONDS = 48 * 3600.0
#: Algorithms that are nothing without calibration.
_NEED_TEXT = ("channel_scales", "learn")

#: Parameters times tokens up to which ``balanced`` weighs every calibration token by its gradients: the pass back takes
#: four times what a pass forward does, ten minutes of two cores here. ``max`` always does.
WEIGHED_LIMIT = 1.2e13
#: Tokens that losses alone are measured on: the mean of squares over them is known to a few per cent.
LOSS_TOKENS = 2048

#: What finished steps are kept as.
_TEXT, _SENSITIVITY, _BLOCKS, _QUANTIZED = "calibration-text", "sensitivity", "blocks", "quantized-blocks"

Progress = Callable[[float], None]


def wanted(plan: Plan, profile: Profile) -> bool:
    """Return whether a plan is calibrated block by block: a decoder, some effort, something quantized."""
    return (
        isinstance(plan.structure, Decoder)
        and profile.quantize.effort != "fast"
        and (plan.cache_type == "int8" or any(fate.scheme is not None for fate in plan.fates))
    )


def weighs_tokens(plan: Plan, profile: Profile) -> bool:
    """Return whether tokens count by how much they matter: not where all weights keep 8 bits, which is enough."""
    if all(fate.scheme is None or fate.scheme.bits == 8 for fate in plan.fates):
        return False
    affordable = plan.weight_count * profile.calibration.tokens <= WEIGHED_LIMIT
    return profile.quantize.effort == "max" or affordable


def check(plan: Plan, profile: Profile) -> None:
    """Refuse an algorithm, or a cache of bytes, that would have nothing to work with.

    Raises:
        UsageError: It needs calibration, and the profile or the model has none.
    """
    if plan.cache_type == "int8" and not wanted(plan, profile):
        raise UsageError(
            "how large keys and values get is seen on a calibration text, and effort 'fast' reads none",
            where=f"profile {profile.name}, graph.cache_type",
            hint="--set quantize.effort=balanced",
        )
    name = profile.quantize.quantizer
    if any(hasattr(load_quantizer(name), needed) for needed in _NEED_TEXT) and not wanted(plan, profile):
        raise UsageError(
            f"the algorithm {name!r} calibrates on text, which effort {profile.quantize.effort!r} does not",
            where=f"profile {profile.name}",
            hint="--set quantize.effort=balanced (models that write text)",
        )


@dataclass(frozen=True)
class Written:
    """What the worker wrote: names of tensors, the small ones' values, and each linear's error.

    ``errors`` are shares of the power of a linear's outputs on the calibration text, ``stored_errors`` the weights' own
    relative errors (:mod:`compress.stored_errors`).
    """

    names: tuple[str, ...]
    inline: Mapping[str, AnyArray]
    errors: Mapping[str, float]
    stored_errors: Mapping[str, float]


@dataclass
class DecoderCalibration:
    """One export's calibration.

    Attributes:
        source: The source as a worker opens it again.
        checkpoint: The same, open.
        profile: What is asked for.
        work: Where temporary files go; they are removed.
        text_file: The user's text, if there is one.
        seed: Of everything that is drawn.
        memory_cap: The most bytes that a model that writes its own text may take.
        threads: Threads; the result does not depend on them.
        kept: What an earlier run of the same export finished, and where to keep what this one does.
    """

    source: Mapping[str, Any]
    checkpoint: Checkpoint
    profile: Profile
    work: Path
    text_file: Path | None = None
    seed: int = 0
    memory_cap: int | None = None
    threads: int = 1
    kept: Kept | None = None
    text: CalibrationText | None = None
    schemes: dict[str, Scheme] = field(default_factory=dict)
    allocation: Allocation | None = None
    token_weights: Path | None = None
    errors: Mapping[str, float] = field(default_factory=dict)

    def read(self, decoder: Decoder, progress: Progress) -> None:
        """Get the text's tokens.

        Raises:
            UsageError: There is too little of it, or it cannot be read.
        """
        known = None if self.kept is None else self.kept.value(_TEXT)
        if known is not None and self.kept is not None:
            self.text = CalibrationText(np.load(self.kept.file(_TEXT)), known, None)
            return
        self.text = calibration_windows(
            self.checkpoint,
            decoder,
            self.profile,
            text_file=self.text_file,
            source=self.source,
            seed=self.seed,
            memory_cap=self.memory_cap,
            work=self.work,
            progress=progress,
        )
        if self.kept is not None and self.text.content is None:  # a given text is read again in a moment
            with self.kept.new_file(_TEXT) as stream:
                np.save(stream, self.text.windows)
            self.kept.keep(_TEXT, dict(self.text.record))

    def measure(self, plan: Plan, progress: Progress) -> Plan:
        """Measure what errors cost: which tokens matter to a linear and, under a budget, every way to store a tensor.

        Returns:
            The plan with the best assignment under the budget; the same plan where the profile's roles decide.

        Raises:
            BudgetError: No assignment keeps the budget; with the nearest that can be kept.
        """
        allocated = self.profile.quantize.allocation == "budget"
        weighted = weighs_tokens(plan, self.profile)
        if not allocated and not weighted:
            return plan
        options = assign.open_tensors(plan, self.profile) if allocated else {}
        answer = self._sensitivity(options, weighted, progress)
        return self._allocate(plan, options, answer["losses"]) if allocated else plan

    def _sensitivity(self, options: Mapping[str, tuple[Scheme, ...]], weighted: bool, progress: Progress) -> Json:
        """Return the worker's answer, or an earlier run's; where tokens are weighed, the weights are in a file then."""
        path = self.work / ".token-weights.npz" if self.kept is None else self.kept.file(f"{_SENSITIVITY}.npz")
        known: Json | None = None if self.kept is None else self.kept.value(_SENSITIVITY)
        if known is not None:
            self.token_weights = path if weighted else None
            return known
        answer = self._run(
            "sensitivity",
            {
                "options": {name: [_listed(scheme) for scheme in schemes] for name, schemes in options.items()},
                "seed": self.seed,
                "tokens": self.profile.calibration.tokens if weighted else LOSS_TOKENS,
                "work": str(self.work),
                "token_weights": str(path),
            },
            progress,
        )
        if weighted:
            self.token_weights = path
        else:
            path.unlink()
        if self.kept is not None:
            if weighted:
                sync(path)
            self.kept.keep(_SENSITIVITY, answer)
        return answer

    def _allocate(
        self, plan: Plan, options: Mapping[str, tuple[Scheme, ...]], losses: Mapping[str, list[float]]
    ) -> Plan:
        candidates = [
            assign.candidate(plan, name, dict(zip(options[name], values, strict=True)))
            for name, values in losses.items()
        ]
        budget = self.profile.budget
        self.allocation, chosen = assign.assign(
            candidates,
            lambda schemes: make_plan(plan.structure, self.profile, self.checkpoint, schemes=schemes),
            max_bytes=None if budget.max_bytes is None else int(budget.max_bytes),
            max_loss=budget.max_kl,
        )
        self.schemes = dict(self.allocation.schemes)
        return chosen

    def quantize(self, data: Path, progress: Progress) -> Written:
        """Quantize block after block into the data file, whose space is claimed.

        Raises:
            SourceError: Weights or hidden states are not finite; which.
        """
        kept = self.kept
        inline = self.work / ".calibrated.npz" if kept is None else kept.file(f"{_QUANTIZED}.npz")
        answer: Json | None = None if kept is None else kept.value(_QUANTIZED)
        if answer is None:
            weights = None if self.token_weights is None else str(self.token_weights)
            state = None if kept is None else str(kept.file(_BLOCKS))
            more = {"data": str(data), "inline": str(inline), "token_weights": weights, "state": state}
            answer = self._run("quantize", more, progress)
            if kept is not None:
                sync(inline)
                kept.keep(_QUANTIZED, answer)
                kept.file(_BLOCKS).unlink(missing_ok=True)
        with np.load(inline) as stored:
            small = {name: stored[name] for name in stored.files}
        if kept is None:
            inline.unlink()
            if self.token_weights is not None:
                self.token_weights.unlink()
        self.errors = answer["errors"]
        return Written(tuple(answer["written"]), small, answer["errors"], answer["stored_errors"])

    @property
    def record(self) -> dict[str, Any]:
        """Return what the manifest keeps: the text, the algorithm, errors and the assignment."""
        assert self.text is not None
        record: dict[str, Any] = {
            "text": dict(self.text.record),
            "algorithm": self.profile.quantize.quantizer,
            "effort": self.profile.quantize.effort,
            "errors": {name: float(f"{error:.3g}") for name, error in self.errors.items()},
        }
        if self.allocation is not None:
            record["predicted_kl"] = float(f"{self.allocation.loss:.4g}")
        return record

    def _run(self, job: str, more: Json, progress: Progress) -> Json:
        assert self.text is not None, "the text is read first"
        windows = self.work / ".calibration-windows.npy"
        np.save(windows, self.text.windows)
        request = {
            "checkpoint": dict(self.source),
            "profile": self.profile.model_dump(mode="json", exclude_none=True),
            "schemes": {name: _listed(scheme) for name, scheme in self.schemes.items()},
            "windows": str(windows),
            "workers": self.threads,
            "threads": 1,
            "job": job,
            **more,
        }
        try:
            response = run_worker("calibrate.decoder_worker", request, timeout=TIMEOUT_SECONDS, progress=progress)
        finally:
            windows.unlink()
        result: Json = response["results"][0]
        return result


def _listed(scheme: Scheme) -> list[Any]:
    return list(astuple(scheme))
