"""What every refusal has to look like, and what may be left behind: nothing."""

from __future__ import annotations

import hashlib
import stat
import time
from pathlib import Path

import pytest

from compress.cli import run

#: Seconds within which a refusal comes, however loaded the machine is; a hang is none.
PATIENCE = 60.0


def snapshot(root: Path) -> dict[str, tuple[int, str]]:
    """Return kind and content of everything below a directory, without following a link."""
    found = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            content = str(path.readlink())
        elif stat.S_ISREG(mode) and path.stat().st_size < 1 << 24:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            content = ""
        found[str(path.relative_to(root))] = (stat.S_IFMT(mode), content)
    return found


class Terminal:
    """Runs commands in a place, and checks what a refusal must be."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self._capsys = root, capsys

    def refuses(self, *words: str, parts: tuple[str, ...] = (), codes: tuple[int, ...] = (1, 2)) -> str:
        """Run a command; returns its message.

        One clear error, no traceback, an exit code of those, soon; nothing anywhere below ``root`` has changed.
        """
        before, begun = snapshot(self.root), time.monotonic()
        self._capsys.readouterr()
        code = run(list(words))
        out, err = self._capsys.readouterr()
        shown = err or out
        assert code in codes, f"exit code {code}: {shown}"
        assert time.monotonic() - begun < PATIENCE, f"it took {time.monotonic() - begun:.0f} s"
        assert "Traceback" not in shown and "error: unexpected" not in shown, shown
        for part in parts:
            assert part in shown, shown
        if words[0] != "verify":
            assert err.startswith("error: ") and out == "", shown
            assert len(err) < 10_000, err
        assert all(sign.isprintable() or sign in "\n\t" for sign in shown), shown
        assert snapshot(self.root) == before
        return shown


@pytest.fixture
def terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Return a terminal in an empty folder; temporary files of libraries go elsewhere."""
    (tmp_path / "root" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "root" / "here")
    return Terminal(tmp_path / "root", capsys)
