"""The documented workflow, container and guide: they parse, and each compress command in them is one that exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from compress.cli import cli

DOCS = Path(__file__).resolve().parents[2] / "docs"
WORKFLOW = DOCS / "ci" / "github-actions.yml"


def steps() -> list[dict[str, Any]]:
    return list(yaml.safe_load(WORKFLOW.read_text())["jobs"]["export"]["steps"])


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words after ``compress`` of each line that runs it, a backslash at a line's end joining two."""
    for line in text.replace("\\\n", " ").splitlines():
        found = re.match(r"\s*(?:\w+=\S+ )*(?:\.venv/bin/)?compress (.*)", line)
        if found:
            # What the shell does behind the command is not the command's.
            words = shlex.split(found[1], comments=True)
            end = next((index for index, word in enumerate(words) if word in (">", "&&", ";", "|")), len(words))
            yield words[:end]


def parse(words: list[str]) -> None:
    """Let click parse a command's words; nothing is run.

    Raises:
        click.ClickException: An option does not exist, an argument is missing.
    """
    command = cli.commands[words[0]]
    command.make_context(words[0], list(words[1:]))


def test_every_command_of_the_workflow_parses() -> None:
    found = [words for step in steps() for words in commands(step.get("run", ""))]
    assert [words[0] for words in found] == ["export", "verify", "sign", "verify"]
    for words in found:
        parse(words)


def test_every_command_of_the_guide_parses() -> None:
    text = (DOCS / "mlops.md").read_text()
    found = [words for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for words in commands(block)]
    assert {"export", "validate", "verify", "sign"} <= {words[0] for words in found}
    for words in found:
        parse(words)


@pytest.mark.parametrize("line", ["compress verify a --publickey k", "compress sign a", "compress export"])
def test_a_wrong_command_is_found(line: str) -> None:
    (words,) = commands(line)
    with pytest.raises(click.ClickException):
        parse(words)


def test_the_workflow_keeps_its_secret_and_the_verdict() -> None:
    document = yaml.safe_load(WORKFLOW.read_text())
    assert document["permissions"] == {"contents": "read"}
    uploads = [step for step in steps() if "upload-artifact" in step.get("uses", "")]
    assert len(uploads) == 2 and all(step["if"] == "always()" for step in uploads)
    assert [step["name"] for step in steps() if "SIGNING_KEY" in str(step)] == ["Sign"]


def test_the_container_is_not_root_and_offline() -> None:
    lines = (DOCS / "ci" / "Containerfile").read_text().splitlines()
    assert "FROM docker.io/library/python:3.11-slim" in lines
    assert lines.index("USER compress") < lines.index('ENTRYPOINT ["compress"]')
    assert any("HF_HUB_OFFLINE=1" in line for line in lines)
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert all((DOCS.parent / name).exists() for name in copied)
