"""``sweep.json`` on the disk, and the lock that lets one sweep at a time write it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import ValidationError

from compress.errors import CompressError
from compress.fleet.model import SCHEMA_VERSION, Sweep
from compress.lock import held
from compress.package.staging import write_file

NAME = "sweep.json"
LOCK_NAME = ".sweep.lock"
#: More is no journal: 10,000 jobs take a tenth of it.
MAX_BYTES = 256 << 20


@contextmanager
def locked(desk: Path, output: str) -> Iterator[None]:
    """Keep other sweeps of this output away, on this machine and on what shares its disk.

    Raises:
        LockedError: Another sweep is at it.
        CompressError: The place cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(held(desk / LOCK_NAME, what="sweeping it", where=output))
        except OSError as error:
            raise CompressError(
                f"cannot write there: {error.strerror}", where=str(desk), hint="choose another place with -o"
            ) from None
        yield


def dumps(sweep: Sweep) -> str:
    """Return a sweep as JSON text."""
    return json.dumps(sweep.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False) + "\n"


def write(sweep: Sweep, desk: Path) -> None:
    """Write the journal whole."""
    write_file(desk / NAME, dumps(sweep))


def read(path: Path) -> Sweep | None:
    """Read a journal, ``None`` where there is none.

    Raises:
        CompressError: It is damaged, or of another schema version.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CompressError(f"the journal cannot be read: {error.strerror}", where=str(path)) from None
    return parse(content, str(path))


def parse(content: bytes, where: str) -> Sweep:
    """Return a journal from its text.

    Raises:
        CompressError: It is damaged, or of another schema version.
    """
    again = "--fresh starts over"
    if len(content) > MAX_BYTES:
        raise CompressError(f"the journal is damaged: more than {MAX_BYTES >> 20} MiB", where=where, hint=again)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CompressError(f"the journal is damaged: {error}", where=where, hint=again) from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise CompressError(
            f"the journal has schema version {version!r}, this compress knows {SCHEMA_VERSION}", where=where, hint=again
        )
    try:
        return Sweep.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the document"
        raise CompressError(f"the journal is damaged: {key}: {first['msg']}", where=where, hint=again) from None
