"""A block whose weights are read a band of rows at a time gives the hidden states of a block that is there whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from compress.errors import SourceError
from compress.source import open_checkpoint
from compress.validation import by_rows
from compress.validation.streaming import StreamedModel

#: Longer than LongRoPE's switch and the sliding windows.
WINDOWS = np.random.default_rng(1).integers(3, 380, (3, 40)).astype(np.int64)
BAND = 4 * 64 * 7  # seven rows of the narrow weights: no multiple of any height


def hidden(directory: Path, *, by_rows: bool) -> npt.NDArray[np.float32]:
    with open_checkpoint(str(directory)) as checkpoint:
        states: npt.NDArray[np.float32] = StreamedModel(checkpoint, by_rows=by_rows).hidden_states(WINDOWS).numpy()
    return states


@pytest.mark.parametrize("name", ["llama", "llama-untied", "mistral", "phi3", "phi3-longrope", "gpt2"])
def test_bands_give_the_states_of_whole_blocks(
    name: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_rows, "BAND_BYTES", BAND)
    whole = hidden(tiny_model(name), by_rows=False)
    bands = hidden(tiny_model(name), by_rows=True)
    assert np.abs(whole).max() > 1
    np.testing.assert_allclose(bands, whole, rtol=0, atol=4e-6)


def test_a_band_that_is_read_wrongly_shows(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: one band of one weight a row too late."""
    monkeypatch.setattr(by_rows, "BAND_BYTES", BAND)
    whole = hidden(tiny_model("llama"), by_rows=False)
    install = by_rows.install

    def late(module: torch.nn.Module, read: by_rows.Read) -> None:
        install(module, lambda start, stop: read(start + (start == 7), stop + (start == 7)))

    monkeypatch.setattr(by_rows, "install", late)
    assert np.abs(hidden(tiny_model("llama"), by_rows=True) - whole).max() > 1e-2


def test_no_weight_of_a_block_is_ever_whole(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_rows, "BAND_BYTES", BAND)
    with open_checkpoint(str(tiny_model("phi3"))) as checkpoint:
        model = StreamedModel(checkpoint, by_rows=True)
        largest = []
        checkpoint_read = checkpoint.read

        def read(name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.float32]:
            rows = checkpoint_read(name, start, stop)
            if ".layers." in name:
                largest.append(rows.nbytes)
            return rows

        monkeypatch.setattr(checkpoint, "read", read)
        model.hidden_states(WINDOWS)
        assert largest and max(largest) <= BAND
        assert all(parameter.is_meta for parameter in model.model.get_decoder().layers.parameters())


def test_a_weight_of_another_shape_is_named(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "other")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(SourceError, match=r"shape \[160, 64\], the config asks for \[96, 64\]"):
        hidden(directory, by_rows=True)
