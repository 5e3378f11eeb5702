"""How a sentence-transformers directory makes one vector of a text: its ``modules.json`` and the files that it names.

The format is that of the package sentence-transformers (2.0 to 6.2 were read): a list of modules run in turn. The first
is the transformer, whose files lie in the directory itself; a pooling turns token vectors into one; a normalisation may
follow. Nothing of that package is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from compress.contracts import Checkpoint
from compress.errors import SourceError, UnsupportedModelError
from compress.source.files import MAX_CONFIG_BYTES, read_json_list, read_json_object

MODULES_NAME = "modules.json"
POOLING_NAME = "1_Pooling/config.json"
NORMALIZE_NAME = "2_Normalize/config.json"
# What the package calls the first module's settings has changed with the model type; it looks for all of them.
TRANSFORMER_NAMES = ("sentence_bert_config.json", "sentence_distilbert_config.json", "sentence_albert_config.json")
SENTENCE_NAMES = (MODULES_NAME, "config_sentence_transformers.json", *TRANSFORMER_NAMES, POOLING_NAME, NORMALIZE_NAME)

PoolingMode = Literal["mean", "cls", "max", "none"]
_MODES = ("mean", "cls", "max")
# Releases before 5.3 store one truth value a mode, later ones the mode's name (or a list of names).
_OLD_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_HINT = "export the token vectors instead, by the directory without modules.json, and pool them in the application"


@dataclass(frozen=True)
class Pooling:
    """What follows the transformer.

    Attributes:
        mode: ``mean`` and ``max`` are taken over the tokens whose attention mask is 1, ``cls`` is the first token;
            ``none``: the model has no pooling, token vectors are its result.
        normalize: The pooled vector is divided by its Euclidean length.
        max_length: Tokens, special ones included, after which a text is cut; ``None`` where nothing but the
            tokenizer's own limit and the position table do.
        lowercase: The text is made lower case before the tokenizer sees it (whatever the tokenizer itself does).
    """

    mode: PoolingMode
    normalize: bool
    max_length: int | None
    lowercase: bool


def read_pooling(checkpoint: Checkpoint) -> Pooling | None:
    """Read what a sentence-transformers directory does with the transformer's output.

    Returns:
        ``None`` if the checkpoint is no such directory (it has no ``modules.json``).

    Raises:
        SourceError: One of its files is damaged, missing, or says something that cannot be.
        UnsupportedModelError: It has other modules than a transformer, one pooling and one normalisation, or pools in
            a way that has no implementation here.
    """
    files = checkpoint.sidecars()
    if MODULES_NAME not in files:
        return None
    modules = _modules(read_json_list(files[MODULES_NAME], MAX_CONFIG_BYTES))
    settings: dict[str, Any] = {}
    for name in TRANSFORMER_NAMES:
        if name in files:
            settings = read_json_object(files[name], MAX_CONFIG_BYTES)
            break
    else:
        name = TRANSFORMER_NAMES[0]
    mode: PoolingMode = "none"
    if "Pooling" in modules:
        if POOLING_NAME not in files:
            raise SourceError(
                "the pooling's settings are missing", where=POOLING_NAME, hint="copy the model again, all of its files"
            )
        mode = _mode(read_json_object(files[POOLING_NAME], MAX_CONFIG_BYTES, POOLING_NAME), checkpoint.config)
    if "Normalize" in modules and NORMALIZE_NAME in files:
        _check_normalize(read_json_object(files[NORMALIZE_NAME], MAX_CONFIG_BYTES, NORMALIZE_NAME))
    return Pooling(mode, "Normalize" in modules, _max_length(settings, name), _flag(settings, "do_lower_case", name))


def _modules(entries: list[Any]) -> list[str]:
    """Return the modules' class names in order, after checking that they are a chain that is known here.

    Raises:
        SourceError: An entry is not what the format says.
        UnsupportedModelError: Another chain.
    """
    found: list[str] = []
    folders = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    for number, entry in enumerate(entries):
        kind, path = (entry.get("type"), entry.get("path", "")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise SourceError(
                f"entry {number} has no type or no path",
                where=MODULES_NAME,
                hint="download or copy the model again",
            )
        package, _, name = kind.rpartition(".")
        if name not in folders or package.partition(".")[0] != "sentence_transformers":
            raise UnsupportedModelError(
                f"the model has a module {kind[:80]!r}; only Transformer, Pooling and Normalize are known",
                where=MODULES_NAME,
                hint=_HINT,
            )
        if path != folders[name]:
            # Also what keeps the folder inside the directory: nothing else is ever opened.
            raise UnsupportedModelError(
                f"the files of module {name} lie in {path[:80]!r}; only {folders[name]!r} is known",
                where=MODULES_NAME,
            )
        found.append(name)
    if found not in (["Transformer"], ["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedModelError(
            f"the modules {', '.join(found) or '(none)'} are in no order that is known here: "
            "Transformer, then Pooling, then Normalize",
            where=MODULES_NAME,
            hint=_HINT,
        )
    return found


def _mode(pooling: Mapping[str, Any], config: Mapping[str, Any]) -> PoolingMode:
    """Return the one mode of a pooling's settings."""
    if "pooling_mode" in pooling:
        given = pooling["pooling_mode"]
        modes = given if isinstance(given, list) else [given]
        if not all(isinstance(mode, str) for mode in modes):
            raise SourceError("pooling_mode is not a name", where=POOLING_NAME)
    else:
        modes = [mode for key, mode in _OLD_KEYS.items() if _flag(pooling, key, POOLING_NAME)]
    if not modes:
        # Older releases fail on such a file, later ones take the mean: too uncertain to guess.
        raise SourceError("no pooling mode is turned on", where=POOLING_NAME, hint='write "pooling_mode": "mean"')
    if len(modes) != 1:
        raise UnsupportedModelError(
            f"several poolings are joined ({', '.join(modes)[:80]})", where=POOLING_NAME, hint=_HINT
        )
    if modes[0] not in _MODES:
        raise UnsupportedModelError(
            f"pooling mode {modes[0][:80]!r} has no implementation; known: {', '.join(_MODES)}",
            where=POOLING_NAME,
            hint=_HINT,
        )
    if not _flag(pooling, "include_prompt", POOLING_NAME, default=True):
        raise UnsupportedModelError(
            "the pooling leaves out the prompt's tokens (include_prompt is false), which a graph cannot tell apart",
            where=POOLING_NAME,
            hint=_HINT,
        )
    width = pooling.get("embedding_dimension", pooling.get("word_embedding_dimension"))
    hidden = config.get("hidden_size", config.get("dim"))
    if width is not None and hidden is not None and width != hidden:
        raise SourceError(
            f"the pooling is for vectors of {width!r}, the model has {hidden!r}",
            where=POOLING_NAME,
            hint="the files are of different models: download or copy the model again",
        )
    return cast(PoolingMode, modes[0])


def _check_normalize(settings: Mapping[str, Any]) -> None:
    for key in ("module_input_name", "module_output_name"):
        if settings.get(key, "sentence_embedding") not in ("sentence_embedding", None):
            raise UnsupportedModelError(
                f"what is normalised is not the sentence embedding ({key} is {str(settings[key])[:80]!r})",
                where=NORMALIZE_NAME,
                hint=_HINT,
            )


def _max_length(settings: Mapping[str, Any], where: str) -> int | None:
    length = settings.get("max_seq_length")
    if length is None:
        return None
    # bool is an int: true would mean a length of one.
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise SourceError(f"max_seq_length is {str(length)[:80]!r}, not a number of tokens", where=where)
    return length


def _flag(settings: Mapping[str, Any], key: str, where: str, *, default: bool = False) -> bool:
    value = settings.get(key, default)
    if not isinstance(value, bool):
        raise SourceError(f"{key} is {str(value)[:80]!r}, not true or false", where=where)
    return value
