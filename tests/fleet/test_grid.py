"""``grid.toml``: what it takes, what it refuses and how it says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import UsageError
from compress.fleet import grid
from compress.fleet.grid import load_grid

PLAIN = {"models": ["smollm2"], "profiles": ["arm-int4"]}


def names(data: object) -> list[str]:
    return [pair.name for pair in load_grid(data).pairs()]  # type: ignore[arg-type]


def test_entries_are_their_reference_or_tables() -> None:
    data = {
        "models": ["smollm2", {"model": "owner/Big Model", "revision": "abc", "name": "big"}, "dir/tiny.gguf"],
        "profiles": ["arm-int4", {"profile": "x86-int8", "set": ["budget.max_kl=0.2"], "name": "strict"}],
        "exclude": [{"model": "big", "profile": "x86-int8"}, {"model": "dir/tiny.gguf", "profile": "arm-int4"}],
    }
    assert names(data) == ["smollm2-arm-int4", "smollm2-strict", "big-arm-int4", "tiny-strict"]
    (_, strict, big, _) = load_grid(data).pairs()
    assert strict.profile.overrides == ["budget.max_kl=0.2"] and big.model.revision == "abc"


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text('models = ["near", "gpt2"]\nprofiles = ["own.toml"]\neval_text = "a.txt"\n')
    (tmp_path / "near").mkdir()
    loaded = load_grid(tmp_path / "grid.toml")
    assert loaded.reference("near") == str(tmp_path / "near") and loaded.reference("gpt2") == "gpt2"
    assert loaded.reference("./far") == str(tmp_path / "far")
    assert loaded.profile("own.toml") == str(tmp_path / "own.toml") and loaded.profile("arm-int4") == "arm-int4"
    assert loaded.path("a.txt") == tmp_path / "a.txt"
    assert (loaded.name, loaded.grid.seed, loaded.grid.retries, loaded.grid.measure) == ("grid.toml", 0, 1, True)
    assert load_grid({**PLAIN, "max_memory": "2GB"}).max_memory == 2_000_000_000


@pytest.mark.parametrize(
    ("data", "what", "hint"),
    [
        ({**PLAIN, "profile": []}, "unknown key 'profile'", "did you mean profiles?"),
        ({**PLAIN, "validat": True}, "unknown key 'validat'", "did you mean validate"),
        ({**PLAIN, "models": [{"model": "a", "revison": "b"}]}, "unknown key 'models.0.revison'", "revision"),
        ({**PLAIN, "profiles": [{"profile": "a", "sets": []}]}, "unknown key 'profiles.0.sets'", "mean set?"),
        ({"models": ["a"]}, "'profiles' is missing", "a grid is a TOML file"),
        ({**PLAIN, "models": []}, "models: List should have at least 1", "a grid is"),
        ({**PLAIN, "models": [{"name": "a"}]}, "'models.0.model' is missing", "keys: model, adapter"),
        ({**PLAIN, "models": [{"model": "a", "name": "../a"}]}, "models.0.name: String should match", "a grid is"),
        ({**PLAIN, "models": [".."]}, "'models.0.name' is missing", "keys: model"),
        ({**PLAIN, "seed": "1"}, "seed: Input should be a valid integer, got '1'", "keys:"),
        ({**PLAIN, "retries": -1}, "retries: Input should be greater", "keys:"),
        ({**PLAIN, "max_memory": "much"}, "'much' is not a size", "800MB"),
        ({**PLAIN, "models": ["a", "b/a"]}, "two jobs are called 'a-arm-int4': a under arm-int4 and b/a", "name = "),
        ({**PLAIN, "models": ["a", "A"]}, "two jobs are called 'a-arm-int4'", "name = "),
        ({**PLAIN, "profiles": ["p", {"profile": "p", "set": ["a=1"]}]}, "two jobs are called 'smollm2-p'", "name = "),
        ({"models": ["a", "a-b"], "profiles": ["b-c", "c"]}, "two jobs are called 'a-b-c'", "name = "),
        ({**PLAIN, "exclude": [{"model": "smolm2"}]}, "an exclude leaves out nothing", "'smolm2' is none of the grid"),
        ({**PLAIN, "exclude": [{}]}, "an exclude leaves out nothing", "neither"),
        ({**PLAIN, "exclude": [{"model": "smollm2"}]}, "the grid excludes every pair", "exclude"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_do(data: dict[str, object], what: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_grid(data)
    assert what in caught.value.what and hint in (caught.value.hint or ""), str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_files_that_are_no_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.toml"
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        load_grid(path)
    for content, what in (
        (b"models = [", "not valid TOML"),
        (b"\xff", "not valid TOML"),
        (b"a=" + b"[" * 9999, "TOML"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=what):
            load_grid(path)
    monkeypatch.setattr(grid, "MAX_BYTES", 3)
    with pytest.raises(UsageError, match="more than"):
        load_grid(path)
    monkeypatch.setattr(grid, "MAX_JOBS", 1)
    with pytest.raises(UsageError, match="2 jobs, 1 are the most"):
        load_grid({**PLAIN, "models": ["a", "b"]})
