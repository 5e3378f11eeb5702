"""How an artifact can be validated in the memory there is: whole, or piece by piece; predicted from sizes alone.

Two workers are predicted, one after the other beside the main process. The *reference* holds a float32 block and what
goes through it, or (``by_rows``) bands of its weights. The *artifact* is mapped from its file and packed into a second
copy for the kernels: whole, or (``in pieces``) a block at a time. What needs the whole (speed, samples) is not measured
then. Constants are resident sets after imports; tests hold the rest against the kernel's own accounting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compress.contracts import Decoder, Encoder
from compress.errors import ResourceError
from compress.planning import Fate, Plan
from compress.profile import Profile
from compress.sizes import format_size

_MB = 1_000_000
#: Python with numpy, onnx-ir and the command line, and what it compares logits in.
_MAIN = 200 * _MB
#: torch and transformers in the reference worker.
REFERENCE = 450 * _MB
#: onnxruntime and numpy in the worker that runs the artifact.
RUNTIME = 110 * _MB
_FLOAT = 4
#: What the reference takes at once: tokens through a block, bytes of the head and of its logits, bytes of a band.
_TOKENS, _HEAD, _BAND = 512, 2 * (64 << 20), 32 << 20
#: The provider whose sessions are run in pieces.
_PROVIDER = "cpu"
#: Budgets that need the whole artifact to be timed.
_TIMED = ("min_speedup_vs_pytorch", "min_speedup_vs_onnx_float")


@dataclass(frozen=True)
class Needs:
    """Predicted peak bytes of all processes together.

    Attributes:
        reference: The source, a block at a time; an encoder whole.
        reference_by_rows: The source, less than a block at a time; ``None`` for encoders.
        artifact: The artifact whole.
        artifact_in_pieces: A block at a time; ``None`` where it cannot be cut.
    """

    reference: int
    reference_by_rows: int | None
    artifact: int
    artifact_in_pieces: int | None

    @property
    def whole(self) -> int:
        """Return the peak of a validation that measures everything."""
        return max(self.reference, self.artifact)

    @property
    def in_pieces(self) -> int | None:
        """Return the least that a validation takes, ``None`` where there is no other than the whole."""
        if self.reference_by_rows is None or self.artifact_in_pieces is None:
            return None
        return max(min(self.reference, self.reference_by_rows), self.artifact_in_pieces)


@dataclass(frozen=True)
class Way:
    """How a validation is run.

    Attributes:
        by_rows: The reference never holds a block.
        in_pieces: Why the artifact is run in pieces, and only its drift measured; ``None`` where it is run whole.
    """

    by_rows: bool = False
    in_pieces: str | None = None


def choose(needs: Needs, cap: int | None) -> Way:
    """Return how to validate within ``cap`` bytes: whole where that fits.

    Raises:
        ResourceError: Not even pieces fit.
    """
    if cap is None or needs.whole <= cap:
        return Way()
    least = needs.in_pieces
    fits = needs.artifact <= cap
    if needs.reference_by_rows is not None and fits and needs.reference_by_rows <= cap:
        return Way(by_rows=True)
    if least is None or least > cap:
        needed = needs.whole if least is None else least
        raise ResourceError(
            f"validation would take {format_size(needed)}, more than --max-memory {format_size(cap)}",
            hint="raise --max-memory, or validate elsewhere: --no-validate now, compress validate later",
        )
    taken = format_size(needs.artifact)
    return Way(needs.reference > cap, f"the whole artifact would take {taken}, --max-memory is {format_size(cap)}")


def check_budget(way: Way, profile: Profile, cap: int | None) -> None:
    """Refuse a budget on speed where speed is not going to be measured: what was not measured cannot pass.

    Raises:
        ResourceError: With what to do about it.
    """
    asked = [name for name in _TIMED if getattr(profile.budget, name) is not None]
    if way.in_pieces is not None and asked:
        without = " ".join(f"--set budget.{name}=none" for name in asked)
        raise ResourceError(
            f"the budget asks for {' and '.join(name.removeprefix('min_') for name in asked)}, which is not measured "
            f"within --max-memory {format_size(cap or 0)}: {way.in_pieces}",
            where=f"profile {profile.name}",
            hint=f"raise --max-memory, export with {without}, or validate elsewhere (--no-validate)",
        )


def needs(
    plan: Plan, profile: Profile, providers: Sequence[str] = (), stored: Mapping[str, int] | None = None
) -> Needs:
    """Predict a validation.

    Args:
        plan: Of the artifact.
        profile: What is measured, and on which provider where ``providers`` names none.
        providers: Where the artifact is run.
        stored: Bytes of its tensors, by name, where they are known better than the plan knows them.
    """
    if isinstance(plan.structure, Encoder):
        taken = _MAIN + _encoder(plan, plan.structure, profile)
        return Needs(taken, None, taken, None)
    work = _Decoding(plan, plan.decoder, profile, stored or {})
    cuttable = set(providers or (profile.provider,)) <= {_PROVIDER} and plan.static_length is None
    return Needs(
        reference=_MAIN + work.reference(),
        reference_by_rows=_MAIN + work.reference(by_rows=True),
        artifact=_MAIN + work.artifact(),
        artifact_in_pieces=_MAIN + work.piece() if cuttable else None,
    )


class _Decoding:
    def __init__(self, plan: Plan, decoder: Decoder, profile: Profile, stored: Mapping[str, int]) -> None:
        self.plan, self.decoder, self.stored = plan, decoder, stored
        self.tokens = profile.validation.tokens
        self.window = min(profile.validation.window, decoder.context_length)
        self.level = profile.quantize.accuracy_level
        layers: dict[int | None, list[str]] = {}
        for linear in decoder.linears:
            layers.setdefault(linear.layer, []).append(linear.name)
        self.layers = [[plan.by_name[name] for name in names] for layer, names in layers.items() if layer is not None]
        self.inner = max(linear.in_features for linear in decoder.linears if linear.layer is not None)

    def reference(self, *, by_rows: bool = False) -> int:
        """Return what the worker holds: weights, all tokens' states, and what some of them need inside a block."""
        hidden = self.decoder.hidden_size
        states = 3 * self.tokens * hidden * _FLOAT
        inside = max(self.window, _TOKENS) * (4 * self.inner + 6 * hidden) * _FLOAT + self._scores()
        # A tensor that is stored in other types is there twice while it is read.
        weights = 2 * _BAND
        if not by_rows:
            sizes = [[fate.rows * fate.columns for fate in layer] for layer in self.layers]
            weights = _FLOAT * max(sum(layer) + max(layer) for layer in sizes)
        return REFERENCE + states + max(weights + inside, _HEAD)

    def artifact(self) -> int:
        """Return what the worker holds of the whole."""
        return RUNTIME + 2 * max(self.plan.data_bytes, sum(self.stored.values())) + 2 * self._logits()

    def piece(self) -> int:
        """Return what the worker holds of the largest piece."""
        held = [sum(map(self._held, layer)) + self._inside() for layer in self.layers]
        ends = [fate for fate in self.plan.fates if fate.role in ("embedding", "head")]
        held += [self._held(fate) + 2 * self._logits() for fate in ends]
        return RUNTIME + max(held)

    def _held(self, fate: Fate) -> int:
        """Return what a session holds of a weight: as stored, packed, and its scales as float32, twice as well.

        Products that are not of integers may widen a whole weight for a moment.
        """
        taken = 2 * self.stored.get(fate.name, fate.nbytes)
        if fate.scheme is None:
            return taken
        count = fate.rows * fate.columns
        if fate.scheme.block_size:
            taken += 2 * _FLOAT * count // fate.scheme.block_size
        return taken + (0 if self.level == 4 else _FLOAT * count)

    def _inside(self) -> int:
        """Return what a window needs inside a block, and on its way from piece to piece."""
        return self.window * (4 * self.inner + 12 * self.decoder.hidden_size) * _FLOAT + self._scores()

    def _scores(self) -> int:
        return 2 * self.decoder.heads * self.window**2 * _FLOAT

    def _logits(self) -> int:
        return self.window * self.decoder.vocab_size * _FLOAT


def _encoder(plan: Plan, encoder: Encoder, profile: Profile) -> int:
    """The reference holds an encoder whole, in float32; so does the float baseline."""
    weights = _FLOAT * plan.weight_count
    longest, batch = max(profile.validation.lengths), max(profile.validation.batches)
    states = batch * longest * (8 * encoder.hidden_size + encoder.heads * longest) * _FLOAT
    logits = batch * longest * encoder.vocab_size * _FLOAT if encoder.task == "fill-mask" else 0
    return REFERENCE + 2 * weights + 2 * states + 2 * logits
