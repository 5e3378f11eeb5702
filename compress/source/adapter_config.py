"""``adapter_config.json`` of PEFT: what is understood, and what has to be refused because merging would be wrong."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import SourceError, UnsupportedModelError
from compress.source.files import MAX_CONFIG_BYTES, contained, read_json_object

# Present and not empty, each of these changes what the adapter computes in a way that is not W + s B A.
UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "megatron_config",
    "target_parameters",
    "trainable_token_indices",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
    "ensure_weight_tying",
)
# The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, MiCA) change the base weights, or how the factors act.
INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
_MAX_PATTERN = 256
_MAX_REPEATS = 2
_MAX_NAME = 256
#: All matching of an adapter together; a real one takes a second.
_MATCHING_SECONDS = 8.0
_MAX_PATTERNS = 4096
#: Ranks and alphas; more than the width of any layer.
MAX_NUMBER = 1 << 24


class Patterns:
    """Values by module name or regular expression, in order; the expressions were checked not to be too complex."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in values.items()]
        self._left = _MATCHING_SECONDS

    def value(self, module: str, default: float) -> float:
        """Return the value of the first pattern that ends the module's name, as ``peft.utils.get_pattern_key`` does.

        Raises:
            SourceError: The name is longer than any, or matching takes without an end.
        """
        if self._compiled and len(module) > _MAX_NAME:
            raise SourceError(f"the module's name {module!r:.80} is longer than any", where="adapter_config.json")
        for pattern, value in self._compiled:
            begun = time.perf_counter()
            found = pattern.match(module)
            self._left -= time.perf_counter() - begun
            if self._left < 0:
                raise SourceError("its patterns take too long to match", where="adapter_config.json")
            if found:
                return value
        return default


@dataclass(frozen=True)
class LoraConfig:
    """The keys that merging needs.

    Attributes:
        rank: Rank r of modules that no pattern names.
        alpha: Its alpha; the product is scaled by ``alpha / r``, or ``alpha / sqrt(r)`` with ``rslora``.
        rslora: Rank-stabilized scaling (Kalajdzievski, arXiv:2312.03732).
        rank_pattern: Ranks of modules by name or pattern.
        alpha_pattern: Their alphas.
        fan_in_fan_out: Base weights are stored as ``[in_features, out_features]``.
        base_model: What the adapter says that it was made for.
    """

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Patterns
    alpha_pattern: Patterns
    fan_in_fan_out: bool
    base_model: str | None

    def scaling(self, module: str, rank: int) -> float:
        """Return the factor of a module's product.

        Args:
            module: The module's name in the model that was tuned.
            rank: The rank its factors have.

        Raises:
            SourceError: The config promises another rank.
        """
        promised = self.rank_pattern.value(module, self.rank)
        if promised != rank:
            raise SourceError(
                f"the adapter's factors of {module!r} have rank {rank}, its config says {promised:g}",
                where="adapter_config.json",
            )
        alpha = self.alpha_pattern.value(module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def load_adapter_config(directory: Path, name: str) -> LoraConfig:
    """Read and check ``adapter_config.json``.

    Raises:
        SourceError: Not JSON, or a key of the wrong type.
        UnsupportedModelError: Not LoRA, or a variant whose merging has no implementation.
    """
    config = read_json_object(contained(directory, name), MAX_CONFIG_BYTES)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(
            f"the adapter's method is {kind!r}; only LoRA can be merged here",
            where=name,
            hint="merge it with peft (merge_and_unload), save the model, and give that",
        )
    used = [key for key in UNSUPPORTED if config.get(key)]
    if config.get("init_lora_weights") not in INITIALIZATIONS:
        used.append(f"init_lora_weights {config['init_lora_weights']!r}")
    if used:
        raise UnsupportedModelError(
            f"the adapter uses {', '.join(used)}, which cannot be merged here",
            where=name,
            hint="merge it with peft (merge_and_unload), save the model, and give that",
        )
    base = config.get("base_model_name_or_path")
    return LoraConfig(
        rank=int(_number(config, "r", name)),
        alpha=_number(config, "lora_alpha", name),
        rslora=config.get("use_rslora") is True,
        rank_pattern=_pattern(config, "rank_pattern", name),
        alpha_pattern=_pattern(config, "alpha_pattern", name),
        fan_in_fan_out=config.get("fan_in_fan_out") is True,
        base_model=base if isinstance(base, str) else None,
    )


def _is_number(value: object) -> bool:
    # NaN is not below anything.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def _number(config: Mapping[str, Any], key: str, where: str) -> float:
    value = config.get(key)
    if not _is_number(value) or value is None or not 0 <= value <= MAX_NUMBER:
        raise SourceError(f"{key} is {value!r:.80}, not a number up to {MAX_NUMBER:,}", where=where)
    return float(value)


def _pattern(config: Mapping[str, Any], key: str, where: str) -> Patterns:
    value = config.get(key) or {}
    if (
        not isinstance(value, dict)
        or len(value) > _MAX_PATTERNS
        or not all(_is_number(number) for number in value.values())
    ):
        raise SourceError(f"{key} is not a mapping of module names to numbers", where=where)
    for pattern in value:
        _check_pattern(pattern, key, where)
    return Patterns(value)


def _check_pattern(pattern: str, key: str, where: str) -> None:
    """Refuse a regular expression whose matching could take forever: many repeats, or a repeated group."""
    repeats = re.findall(r"(?<!\\)[*+?{]", pattern)
    if len(pattern) > _MAX_PATTERN or len(repeats) > _MAX_REPEATS or re.search(r"\)[*+{]", pattern):
        raise SourceError(f"the pattern {pattern[:60]!r} in {key} is too complex", where=where)
    try:
        re.compile(pattern)
    except re.error as error:
        raise SourceError(
            f"the pattern {pattern!r} in {key} is not a regular expression: {error}", where=where
        ) from error
