from __future__ import annotations

import hashlib
import json
from pathlib import Path

import geometry
import geometry_encoders
import pytest
import torch
import transformers
from transformers import AutoModel, AutoTokenizer

TINY = {
    "minilm": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2},
    "tinybert": {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1},
    "distilbert": {"dim": 48, "hidden_dim": 96, "n_layers": 2},
    "albert": {"embedding_size": 16, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3},
    "electra": {"embedding_size": 16, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2},
}


@pytest.fixture(autouse=True)
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "POOL", 1 << 18)
    monkeypatch.setattr(geometry, "BLOCK", 1 << 12)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, changes in TINY.items():
        config = geometry_encoders.CONFIGS[name] | {"vocab_size": 1024, "max_position_embeddings": 64} | changes
        monkeypatch.setitem(geometry_encoders.CONFIGS, name, config)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("minilm", 22_713_216), ("tinybert", 14_350_248), ("distilbert", 66_362_880), ("albert", 11_683_584),
     ("electra", 13_483_008)],
)  # fmt: skip
def test_the_geometry_is_the_real_models(name: str, parameters: int) -> None:
    found = geometry_encoders.specs(geometry_encoders.build_config(name, "embedding"))
    assert sum(torch.Size(spec.shape).numel() for spec in found) == parameters


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("task", geometry_encoders.TASKS)
@pytest.mark.parametrize("name", TINY)
def test_transformers_loads_every_tensor_of_every_head(name: str, task: str, tmp_path: Path) -> None:
    geometry_encoders.write(name, tmp_path / "a", task=task)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model, loading = kind.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(loading.values()), loading
    # What transformers itself saves has the same names.
    model.save_pretrained(tmp_path / "b")
    written, saved = ({name for name, _ in tensors(tmp_path / folder)} for folder in "ab")
    assert written == saved
    labels = {"text-classification": 2, "token-classification": 9}.get(task)
    if labels:
        assert model.config.num_labels == len(model.config.label2id) == labels
    with torch.no_grad():
        output = model(**AutoTokenizer.from_pretrained(tmp_path / "a")("names and values", return_tensors="pt"))
    assert bool(torch.isfinite(output[0]).all())


def tensors(directory: Path) -> list[tuple[str, torch.Tensor]]:
    from safetensors.torch import load_file

    return list(load_file(directory / "model.safetensors").items())


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("name", "special"), [("electra", [101, 102, 0, 103]), ("albert", [2, 3, 0, 4])])
def test_the_tokenizer_has_the_models_ids(name: str, special: list[int], tmp_path: Path) -> None:
    geometry_encoders.write(name, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id]
    assert ids == special
    assert len(tokenizer) == 1024
    assert len({tokenizer.decode([index]) for index in range(1024)}) == 1024
    pair = tokenizer("Assignment statements", "bind names")
    assert pair["input_ids"][0] == special[0] and pair["input_ids"].count(special[1]) == 2
    assert pair["token_type_ids"][0] == 0 and pair["token_type_ids"][-1] == 1
    text = "assignment statements are used to ( re ) bind names to values."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.usefixtures("tiny")
def test_only_models_with_segments_are_given_them(tmp_path: Path) -> None:
    geometry_encoders.write("distilbert", tmp_path)
    assert set(AutoTokenizer.from_pretrained(tmp_path)("a")) == {"input_ids", "attention_mask"}


@pytest.mark.usefixtures("tiny")
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    digests = {}
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        geometry_encoders.write("albert", tmp_path / folder, seed=seed)
        files = sorted((tmp_path / folder).iterdir())
        digests[folder] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert digests["a"] == digests["b"]
    assert digests["a"]["model.safetensors"] != digests["c"]["model.safetensors"]


def sizes(directory: Path, model: torch.nn.Module) -> list[torch.Tensor]:
    """Return the root mean square of every channel of each hidden state."""
    text = AutoTokenizer.from_pretrained(directory)("names and values, and what they mean", return_tensors="pt")
    with torch.no_grad():
        states = model(**text, output_hidden_states=True).hidden_states
    return [state[0].pow(2).mean(0).sqrt() for state in states[1:]]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", TINY)
def test_a_few_channels_of_the_hidden_state_are_much_larger(name: str, tmp_path: Path) -> None:
    geometry_encoders.write(name, tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    channels = sizes(tmp_path, model)
    assert len({int(channel.argmax()) for channel in channels}) == 1
    # The control: with no channel larger in the weights, none stands out like that in the hidden state.
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.02, generator=generator)
    largest, plain = (
        [float(channel.max() / channel.median()) for channel in each] for each in (channels, sizes(tmp_path, model))
    )
    assert min(largest) > 3.5 > max(plain)


@pytest.mark.usefixtures("tiny")
def test_minilm_is_a_sentence_transformers_directory(tmp_path: Path) -> None:
    from compress.source import open_checkpoint
    from compress.source.sentence_transformers import Pooling, read_pooling

    geometry_encoders.write("minilm", tmp_path / "a")
    geometry_encoders.write("minilm", tmp_path / "b", task="fill-mask")
    with open_checkpoint(str(tmp_path / "a")) as checkpoint:
        assert read_pooling(checkpoint) == Pooling("mean", True, 256, False)
    with open_checkpoint(str(tmp_path / "b")) as checkpoint:
        assert read_pooling(checkpoint) is None


def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit, match="not empty"):
        geometry_encoders.write("minilm", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
