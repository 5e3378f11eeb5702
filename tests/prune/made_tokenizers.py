"""Small tokenizers of every kind, made of text that ships with Python."""

from __future__ import annotations

import json
import string
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPACE = "\u2581"
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def passages() -> list[str]:
    return [topics[name] for name in sorted(topics)]


def text() -> str:
    """The text that vocabularies are chosen from."""
    return "\n\n".join(passages()[10:18])


def other_text() -> str:
    return "\n\n".join(passages()[30:34]) + "\nnaïve ☃ 漢字\t\u0301 \x07 end"


def save(tokenizer: Tokenizer, directory: Path, kind: str = "PreTrainedTokenizerFast", **special: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": kind, "model_max_length": 512, **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def byte_level(directory: Path, size: int = 1200) -> Path:
    """GPT-2's kind, with one added token behind the model's own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(passages()[:20], trainer)
    tokenizer.add_tokens(["<|user|>"])
    return save(tokenizer, directory, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def byte_fallback(directory: Path, size: int = 900) -> Path:
    """Llama's kind, as it is converted from SentencePiece: every way to split a piece is a merge."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator([*passages()[:20], "naïve"], trainers.BpeTrainer(vocab_size=size, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    longer = [left + right for left, right in learnt["merges"]]
    singles = [piece for piece in learnt["vocab"] if len(piece) == 1]
    vocab = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", *BYTES, *longer, *singles])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in longer
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps: list[Any] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens(["<|assistant|>", "<|end|>"])
    return save(tokenizer, directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram(directory: Path, size: int = 700) -> Path:
    """ALBERT's kind."""
    tokenizer = Tokenizer(models.Unigram())
    quotes = [normalizers.Replace(two, '"') for two in ("``", "''")]
    tokenizer.normalizer = normalizers.Sequence(
        [*quotes, normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    # What transformers' AlbertTokenizer makes of it, whatever the file says.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])  # type: ignore[list-item]
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(passages()[:20], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return save(tokenizer, directory, "AlbertTokenizer", mask_token="[MASK]", **names)


def wordpiece(directory: Path, size: int = 1500) -> Path:
    """BERT's kind, with special tokens that are not the first ones, and its plain list of words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    unused = [f"unused{letter}" for letter in string.ascii_lowercase]
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=["[PAD]", *unused, *special], show_progress=False
    )
    tokenizer.train_from_iterator(passages()[:20], trainer)
    document = json.loads(tokenizer.to_str())
    # The unused ones are ordinary tokens that no text gives.
    document["added_tokens"] = [entry for entry in document["added_tokens"] if entry["content"] not in unused]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]"))
    )
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding(length=128, pad_id=0, pad_token="[PAD]")
    vocab = document["model"]["vocab"]
    save(
        tokenizer,
        directory,
        "BertTokenizer",
        do_lower_case=True,
        **{f"{name[1:-1].lower()}_token": name for name in special[1:]},
    )  # type: ignore[arg-type]
    (directory / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.__getitem__)) + "\n")
    return directory


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "unigram": unigram, "wordpiece": wordpiece}
