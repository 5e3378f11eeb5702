"""What was asked for beside what it was asked of: refused before work starts, with what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.assign import open_tensors
from compress.contracts import Checkpoint, Encoder, Structure
from compress.errors import ProviderError, UsageError
from compress.planning import Plan
from compress.profile import Profile
from compress.source.base import TOKENIZER_NAMES
from compress.tokens import Tokenizer
from compress.validation.labels import read_examples

if TYPE_CHECKING:
    from compress.pipeline import ExportOptions


def check_provider(profile: Profile) -> None:
    """Refuse to measure on a provider that does not work here, before anything is built.

    Raises:
        ProviderError: With the reason and both remedies.
    """
    from compress.validation.on_provider import require

    try:
        require((profile.provider,))
    except ProviderError as error:
        remedy = "or --no-validate, and `compress validate` where it works"
        raise ProviderError(
            error.what, where=error.where, hint=f"{error.hint}, {remedy}" if error.hint else remedy
        ) from None


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Refuse a ``tokenizer.json`` that the library refuses: it would be copied, and told by whoever uses the artifact.

    Raises:
        CompressError: It is damaged, or takes more time or memory than any.
    """
    path = checkpoint.sidecars().get(TOKENIZER_NAMES[0])
    if path is not None:
        Tokenizer(path=path, label=TOKENIZER_NAMES[0]).close()


def check_labels(structure: Structure, config: Mapping[str, Any], options: ExportOptions) -> None:
    """Refuse labelled examples that cannot be read or are not this model's, before work starts.

    Raises:
        UsageError: The model writes text, or the file is not what its task needs: with the line's number.
    """
    if options.eval_labels is None:
        return
    if not isinstance(structure, Encoder):
        raise UsageError(
            "labelled examples are for models with a task's head; this one writes text",
            hint="leave --eval-labels out; --eval-text measures its drift",
        )
    read_examples(options.eval_labels, structure.task, config)


def check_calibration(plan: Plan, profile: Profile, options: ExportOptions) -> None:
    """Refuse a calibration text that nothing would read.

    Raises:
        UsageError: The profile calibrates nothing on this model, or on text that the model writes itself.
    """
    from compress.calibrate import decoder, encoder

    if options.calibration_text is None or profile.prune.wanted:  # pruning reads it, or has refused it
        return
    writes = not isinstance(plan.structure, Encoder)
    if writes:
        reads = decoder.wanted(plan, profile)
        remedy = "--set quantize.effort=balanced"
    else:
        reads = encoder.wanted(plan, profile) or profile.quantize.activation_bits is not None
        remedy = "take a profile that calibrates encoders, as x86-int8 does"
    if not reads:
        raise UsageError(
            f"profile {profile.name} calibrates nothing on a text for this model",
            where=str(options.calibration_text),
            hint=f"leave --calibration-text out, or {remedy}",
        )
    if writes and profile.calibration.source == "self":
        raise UsageError(
            f"profile {profile.name} calibrates on text that the model writes itself; the given one would not be read",
            where=str(options.calibration_text),
            hint="leave --calibration-text out, or --set calibration.source=text",
        )


def _check_cache(structure: Structure, profile: Profile) -> None:
    """Refuse to measure texts that a static decoder's cache does not hold.

    Raises:
        UsageError: A window, or prompt and new tokens together, are longer.
    """
    if isinstance(structure, Encoder) or profile.graph.static_length is None:
        return
    asked, slots = profile.validation, min(profile.graph.cache_length, structure.context_length)
    # Prompts are cut to the positions that the model has.
    longest = min(max(asked.window, asked.prompt_tokens + asked.new_tokens), structure.context_length)
    if longest > slots:
        raise UsageError(
            f"validation runs {longest} tokens, a cache of {slots} does not hold them",
            where=f"profile {profile.name}",
            hint=f"--set graph.cache_length={longest}, or lower validation.window, prompt_tokens and new_tokens",
        )


def check_plan(plan: Plan, profile: Profile) -> None:
    """Refuse an algorithm that would have no calibration, and to choose bits where there is nothing to choose.

    Raises:
        UsageError: The algorithm needs calibration, and there is none; or bits are to be chosen for an encoder, or
            where the profile leaves no weight's bits open; or a graph's fixed length is beyond the model's positions.
    """
    from compress.calibrate import decoder

    length, positions = profile.graph.static_length, plan.structure.context_length
    if length is not None and length > positions:
        raise UsageError(
            f"a graph for {length} tokens is longer than the model's table of {positions} positions",
            where=f"profile {profile.name}",
            hint=f"--set graph.static_length={positions} --set validation.max_length={positions}",
        )
    _check_cache(plan.structure, profile)
    decoder.check(plan, profile)
    if profile.quantize.allocation != "budget":
        return
    hint = "--set quantize.allocation=roles takes the bits that the profile says"
    if isinstance(plan.structure, Encoder):
        raise UsageError(
            'quantize.allocation = "budget" chooses bits for models that write text; this one is an encoder',
            where=f"profile {profile.name}",
            hint=hint,
        )
    if not open_tensors(plan, profile):
        raise UsageError(
            "there are no bits to choose: the profile quantizes no weight in blocks",
            where=f"profile {profile.name}",
            hint=hint,
        )


def check_unread(options: ExportOptions) -> None:
    """Refuse a calibration text for a plan that measures nothing.

    Raises:
        UsageError: Always, where a text is given.
    """
    if options.calibration_text is not None:
        raise UsageError(
            "a plan reads a text only where it chooses bits, by what they cost on it",
            where=str(options.calibration_text),
            hint="leave --calibration-text out, or --set quantize.effort=balanced --set budget.max_bytes=SIZE",
        )
