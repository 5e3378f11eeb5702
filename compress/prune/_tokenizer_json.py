"""A ``tokenizer.json`` (the ``tokenizers`` library's format): read with suspicion, and written again with other ids.

Only what a token's id depends on is interpreted here. Normalizer, pre-tokenizer and decoder are taken over unread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from compress.errors import CompressError, SourceError, UnsupportedModelError
from compress.source.files import contained, read_json_object
from compress.tokens import Tokenizer

TOKENIZER_NAME = "tokenizer.json"
MAX_TOKENIZER_BYTES = 64 << 20
"""The largest in use (256,000 tokens with pretty-printed merges) take some 35 MiB."""

Kind = Literal["BPE", "WordPiece", "Unigram"]
KINDS: tuple[Kind, ...] = ("BPE", "WordPiece", "Unigram")
PROCESSORS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing", "ByteLevel", "Sequence")


@dataclass(frozen=True)
class TokenizerFile:
    """What a ``tokenizer.json`` says, checked.

    Attributes:
        kind: Its model.
        document: The file as it is; not to be changed.
        pieces: The model's own tokens and their ids; each id once.
        added: Tokens that are cut out of a text before the model sees it, and their ids; some are also in ``pieces``.
        merges: Of a BPE model, in order.
        label: The file's name, for messages.
    """

    kind: Kind
    document: Mapping[str, Any]
    pieces: Mapping[str, int]
    added: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]
    label: str

    @property
    def model(self) -> Mapping[str, Any]:
        """Return the model's section."""
        return cast(Mapping[str, Any], self.document["model"])

    def tokens(self) -> dict[str, int]:
        """Return the model's and the added tokens with their ids."""
        return {**self.pieces, **self.added}

    def named_ids(self) -> set[int]:
        """Return the ids that the file itself names: added tokens, post-processor, padding, unknown token."""
        ids = {*self.added.values(), *_processor_ids(self.document.get("post_processor"), self.label)}
        ids |= _padding_ids(self.document)
        unknown = self.model.get("unk_id") if self.kind == "Unigram" else self.pieces.get(self.model.get("unk_token"))  # type: ignore[arg-type]
        if unknown is not None:
            ids.add(unknown)
        return ids

    def backend(self) -> Tokenizer:
        """Return what encodes with it."""
        return load_backend(self.document, self.label)


def load_backend(document: Mapping[str, Any], label: str) -> Tokenizer:
    """Return what encodes with a document.

    Raises:
        SourceError: The library refuses it.
    """
    try:
        return Tokenizer(document=json.dumps(document), label=label)
    except CompressError as error:
        raise SourceError(error.what, where=label, hint="download or copy the model again") from error


def read_tokenizer(directory: Path) -> TokenizerFile:
    """Read and check ``tokenizer.json``.

    Raises:
        SourceError: It is missing, too large, not JSON, or contradicts itself.
        UnsupportedModelError: Its model, or an option of it, cannot be trimmed.
    """
    document = read_json_object(contained(directory, TOKENIZER_NAME), MAX_TOKENIZER_BYTES)
    label = TOKENIZER_NAME
    model = document.get("model")
    if not isinstance(model, dict):
        raise SourceError("the tokenizer has no model", where=label, hint="download or copy the model again")
    kind = _kind(model, label)
    pieces = _unigram_pieces(model, label) if kind == "Unigram" else _pieces(model, label)
    merges = _merges(model, pieces, label) if kind == "BPE" else ()
    added = _added(document, label)
    _check_options(kind, model, label)
    file = TokenizerFile(kind, document, pieces, added, merges, label)
    # The library gives added tokens ids by its own rules; a file that says otherwise means two things at once.
    _check_ids(file.tokens(), file.backend(), label)
    return file


def renumbered(file: TokenizerFile, new_ids: Mapping[int, int]) -> dict[str, Any]:
    """Return the document with only the tokens of ``new_ids``.

    Args:
        file: The tokenizer.
        new_ids: New id by old id; holds all of :meth:`TokenizerFile.named_ids` that the model has rows for.

    Raises:
        SourceError: One of those is missing, or the library would number the tokens otherwise.
    """
    missing = file.named_ids() - _padding_ids(file.document) - set(new_ids)
    if missing:
        raise SourceError(f"the tokenizer names token {min(missing)}, which is not kept", where=file.label)
    document = dict(file.document)
    document["model"] = _renumbered_model(file, new_ids)
    document["added_tokens"] = [
        {**entry, "id": new_ids[entry["id"]]} for entry in file.document.get("added_tokens") or []
    ]
    document["post_processor"] = _renumbered_processor(file.document.get("post_processor"), new_ids)
    for old in _padding_ids(file.document):  # one, and perhaps none of the model's
        document["padding"] = {**document["padding"], "pad_id": new_ids.get(old, old)}
    expected = {token: new_ids[old] for token, old in file.tokens().items() if old in new_ids}
    _check_ids(expected, load_backend(document, file.label), file.label)
    return document


def _renumbered_model(file: TokenizerFile, new_ids: Mapping[int, int]) -> dict[str, Any]:
    model = dict(file.model)
    if file.kind == "Unigram":
        model["vocab"] = [entry for old, entry in enumerate(file.model["vocab"]) if old in new_ids]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_ids[model["unk_id"]]
        return model
    kept = sorted((new_ids[old], piece) for piece, old in file.pieces.items() if old in new_ids)
    model["vocab"] = {piece: new for new, piece in kept}
    if file.kind == "BPE":
        vocab = model["vocab"]
        model["merges"] = [
            entry
            for entry, (left, right) in zip(file.model["merges"], file.merges, strict=True)
            if left in vocab and right in vocab and left + right in vocab
        ]
    return model


# -------------------------------------------------------------------------------------------------------- reading


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _kind(model: Mapping[str, Any], label: str) -> Kind:
    name = model.get("type")
    if name is None:  # files from before 2020 do not say
        guesses: dict[str, Kind] = {"merges": "BPE", "unk_id": "Unigram", "max_input_chars_per_word": "WordPiece"}
        name = next((kind for key, kind in guesses.items() if key in model), None)
    for kind in KINDS:
        if name == kind:
            return kind
    raise UnsupportedModelError(
        f"a vocabulary cannot be trimmed of a {name!r} tokenizer",
        where=label,
        hint=f"leave prune.vocabulary out; {', '.join(KINDS)} can be trimmed",
    )


def _check_options(kind: Kind, model: Mapping[str, Any], label: str) -> None:
    if kind != "BPE":
        return
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise UnsupportedModelError(
                f"the vocabulary of a BPE tokenizer with {key} cannot be trimmed",
                where=label,
                hint="leave prune.vocabulary out",
            )


def _damaged(what: str, label: str) -> SourceError:
    return SourceError(f"the tokenizer is damaged: {what}", where=label, hint="download or copy the model again")


def _pieces(model: Mapping[str, Any], label: str) -> dict[str, int]:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise _damaged("its model has no vocabulary", label)
    for piece, number in vocab.items():
        if not _is_id(number):
            raise _damaged(f"the id of {piece!r} is {number!r}", label)
    if len(set(vocab.values())) != len(vocab):
        raise _damaged("two tokens have the same id", label)
    return vocab


def _unigram_pieces(model: Mapping[str, Any], label: str) -> dict[str, int]:
    vocab = model.get("vocab")
    if not isinstance(vocab, list) or not vocab:
        raise _damaged("its model has no vocabulary", label)
    for entry in vocab:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise _damaged(f"{entry!r:.80} is not a piece and its score", label)
        if not isinstance(entry[1], int | float) or not abs(entry[1]) < float("inf"):
            raise _damaged(f"the score of {entry[0]!r:.80} is {entry[1]!r}", label)
    pieces = {entry[0]: number for number, entry in enumerate(vocab)}
    if len(pieces) != len(vocab):
        raise _damaged("a piece is there twice", label)
    unknown = model.get("unk_id")
    if unknown is not None and not (_is_id(unknown) and unknown < len(vocab)):
        raise _damaged(f"its unknown token is {unknown!r}", label)
    return pieces


def _merges(model: Mapping[str, Any], pieces: Mapping[str, int], label: str) -> tuple[tuple[str, str], ...]:
    """Return the merges: each is a pair, or both parts in one string with a space between."""
    found = []
    listed = model.get("merges")
    if not isinstance(listed, list):
        raise _damaged("its model has no merges", label)
    for entry in listed:
        parts = entry.split(" ") if isinstance(entry, str) else entry
        if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts)):
            raise _damaged(f"{entry!r:.80} is not a merge", label)
        left, right = parts
        if left not in pieces or right not in pieces or left + right not in pieces:
            raise _damaged(f"a token of the merge {entry!r:.80} is not in the vocabulary", label)
        found.append((left, right))
    return tuple(found)


def _added(document: Mapping[str, Any], label: str) -> dict[str, int]:
    added: dict[str, int] = {}
    entries = document.get("added_tokens") or []
    if not isinstance(entries, list):
        raise _damaged("its added tokens are no list", label)
    for entry in entries:
        if not (isinstance(entry, dict) and isinstance(entry.get("content"), str) and _is_id(entry.get("id"))):
            raise _damaged(f"{entry!r:.80} is not an added token", label)
        added[entry["content"]] = entry["id"]
    return added


def _padding_ids(document: Mapping[str, Any]) -> set[int]:
    padding = document.get("padding")
    return {padding["pad_id"]} if isinstance(padding, Mapping) and _is_id(padding.get("pad_id")) else set()


def _check_ids(expected: Mapping[str, int], backend: Tokenizer, label: str) -> None:
    actual = backend.vocabulary()
    if actual == expected:
        return
    different = sorted(token for token in {*expected, *actual} if expected.get(token) != actual.get(token))
    token = different[0]
    raise SourceError(
        f"the tokenizer contradicts itself: {token!r:.80} is {expected.get(token)} in the file, "
        f"{actual.get(token)} when it is loaded",
        where=label,
        hint="load it with transformers, save it again, and use that",
    )


# -------------------------------------------------------------------------------------------------- post-processor


def _steps(processor: Any, label: str) -> Iterator[Mapping[str, Any]]:
    if processor is None:
        return
    if not isinstance(processor, Mapping) or processor.get("type") not in PROCESSORS:
        name = processor.get("type") if isinstance(processor, Mapping) else processor
        raise UnsupportedModelError(
            f"the tokenizer's post-processor {name!r:.80} is not known", where=label, hint="leave prune.vocabulary out"
        )
    if processor["type"] != "Sequence":
        yield processor
        return
    for step in processor.get("processors") or []:
        yield from _steps(step, label)


def _processor_ids(processor: Any, label: str) -> set[int]:
    ids: set[int] = set()
    for step in _steps(processor, label):
        if step["type"] == "TemplateProcessing":
            for token in step["special_tokens"].values():
                ids.update(token["ids"])
        elif step["type"] in ("BertProcessing", "RobertaProcessing"):
            ids.update((step["sep"][1], step["cls"][1]))
    return ids


def _renumbered_processor(processor: Any, new_ids: Mapping[int, int]) -> Any:
    """Return a post-processor whose ids are the new ones; the library has checked its form."""
    if processor is None:
        return None
    changed = dict(processor)
    if processor["type"] == "Sequence":
        changed["processors"] = [_renumbered_processor(step, new_ids) for step in processor["processors"]]
    elif processor["type"] == "TemplateProcessing":
        changed["special_tokens"] = {
            name: {**token, "ids": [new_ids[old] for old in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    elif processor["type"] in ("BertProcessing", "RobertaProcessing"):
        for part in ("sep", "cls"):
            token, old = processor[part]
            changed[part] = [token, new_ids[old]]
    return changed
