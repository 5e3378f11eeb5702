"""Where an export works: a hidden directory beside the output that outlives a kill, and gives the output at the end.

``.NAME.partial/`` holds ``lock`` (:mod:`compress.lock`), ``journal`` (:mod:`compress.journal`), ``result`` (becomes
NAME), ``state`` (what finished steps left for the next ones) and ``scratch`` (emptied by the next run). The same
command goes on from what the journal says is finished; the workspace is gone when the output is there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from compress import temporary
from compress.errors import CompressError, UsageError, WorkerKilledError
from compress.journal import Journal
from compress.kept import NOTES, Kept
from compress.lock import held, held_directory, holder
from compress.package.staging import check_output, sync
from compress.package.writer import disk_full, is_full

_RESULT, _STATE, _SCRATCH, _LOCK, _JOURNAL = "result", "state", "scratch", "lock", "journal"
#: The journal's entry before the result takes its place, and of a scratch directory that lies elsewhere.
_DONE, _ELSEWHERE = "done", "scratch"
#: Of scratch directories that are not in the workspace.
_PREFIX = "compress-export-"
_log = logging.getLogger(__name__)


class Workspace:
    """One run's place; see :func:`opened`.

    Attributes:
        output: What the result becomes.
        directory: The result while it is made.
        journal: What is finished.
        resumed: Whether an earlier run of the same command left finished work.
    """

    def __init__(self, root: Path, output: Path, journal: Journal) -> None:
        self.root, self.output, self.journal = root, output, journal
        self.directory, self._state, self.scratch = root / _RESULT, root / _STATE, root / _SCRATCH
        self.resumed = not journal.fresh and self.has_work

    @property
    def has_work(self) -> bool:
        """Whether there is something that the next run need not do again."""
        # What is long has files before it is finished: the blocks that are done, a distillation's steps.
        return bool(self.journal.names() - NOTES) or (self._state.is_dir() and any(self._state.iterdir()))

    @property
    def done(self) -> Any | None:
        """What :meth:`finish` was told, where the result is in its place already; else ``None``."""
        told = self.journal.get(_DONE)
        return None if told is None or self.directory.exists() or not self.output.exists() else told

    @property
    def kept(self) -> Kept:
        """What finished steps leave."""
        return Kept(self.journal, self._state)

    def finish(self, value: Any) -> None:
        """Put the result, complete, into its place; ``value`` is what a run that comes too late is told.

        Raises:
            CompressError: Somebody else made something there meanwhile.
        """
        self.directory.chmod(0o755)
        for path in self.directory.rglob("*"):
            sync(path)
        sync(self.directory)
        self.journal.put(_DONE, value)
        try:
            os.rename(self.directory, self.output)  # noqa: PTH104 - must replace an empty directory and nothing else
        except OSError as error:
            raise CompressError(
                f"cannot put the result in its place: {error.strerror}", where=str(self.output)
            ) from None
        sync(self.output.parent)

    def restart(self) -> None:
        """Drop an earlier run's work."""
        self.journal.forget_from()
        for path in (self.directory, self._state):
            _remove(path)
            path.mkdir()
        self.resumed = False

    def begin(self) -> None:
        """Make the directories; remove what an earlier run left beside its results."""
        for elsewhere in self.journal.all(_ELSEWHERE):
            _remove_ours(Path(str(elsewhere)))
        stay = {_LOCK, _JOURNAL, *(() if self.journal.fresh else (_RESULT, _STATE))}
        for path in self.root.iterdir():
            if path.name not in stay:
                _remove(path)
        for path in (self.directory, self._state):
            path.mkdir(exist_ok=True)
        if os.environ.get("TMPDIR"):  # the user knows a place for large files
            self.scratch = temporary.make(_PREFIX)
            self.journal.put(_ELSEWHERE, str(self.scratch))
        else:
            self.scratch.mkdir()

    def keeps(self, error: BaseException) -> bool:
        """Return whether the workspace stays after a failure: there is work, and the next run may well succeed."""
        stopped = isinstance(error, KeyboardInterrupt | WorkerKilledError)
        return self.has_work and (stopped or self.resumed)


def check(output: Path) -> None:
    """Refuse an output that is there already, unless a run that was killed at its very end made it.

    Raises:
        UsageError: It exists and is not an empty directory.
    """
    if not _root(output).is_dir():
        check_output(output)


@contextmanager
def opened(output: Path, basis: Mapping[str, Any], *, fresh: bool = False) -> Iterator[Workspace]:
    """Yield the workspace of an output, with what an earlier run of the same command finished.

    The body calls :meth:`Workspace.finish` at its end. On a failure nothing is left behind, unless it was an interrupt
    or a killed worker and there is finished work (or an earlier run's): that is kept and told.

    Args:
        output: The output directory.
        basis: Everything that the results depend on; of another basis nothing is used.
        fresh: Whether to start over in any case.

    Raises:
        LockedError: Another run works on the same output.
        UsageError: The output is there already.
        CompressError: The place cannot be written.
    """
    root, made = _root(output), _missing_parents(output)
    try:
        _check_root(root)
        with ExitStack() as stack:
            try:
                earlier = stack.enter_context(held(root / _LOCK, what="writing to it", where=output))
                space = _prepared(root, output, basis, fresh)
            except OSError as error:
                if is_full(error):
                    raise disk_full(output.parent) from None
                raise CompressError(
                    f"cannot write there: {error.strerror}",
                    where=str(output.parent),
                    hint="choose another place with -o",
                ) from None
            stack.callback(space.journal.close)
            _explain(space, earlier)
            try:
                with temporary.within(space.scratch):
                    yield space
            except BaseException as error:
                if space.keeps(error):
                    _remove(space.scratch)
                    _log.warning("what is finished is kept in %s: the same command goes on from there", root)
                else:
                    _remove_all(space)
                raise
            _remove_all(space)
    finally:
        _remove_empty(made)  # after a success the nearest one is not empty, and stays


@contextmanager
def alone(artifact: Path) -> Iterator[None]:
    """Hold an artifact for as long as its proof is renewed; what is temporary lies beside it, or in ``TMPDIR``.

    Raises:
        LockedError: Another run holds it.
    """
    from compress.validation.in_pieces import PIECE_NAME

    where = artifact.absolute()
    given = os.environ.get("TMPDIR")
    place = where.parent if not given else Path(given)
    digest = hashlib.sha256(os.fsencode(where)).hexdigest()[:8]
    root = place / f".{where.name}.validation-{digest}"
    with held_directory(artifact, what="validating it"):
        for left in (root, *artifact.glob(f"**/*{PIECE_NAME}"), *artifact.glob("**/.*.partial")):
            _remove(left)  # a killed run's
        root.mkdir()
        try:
            with temporary.within(root):
                yield
        finally:
            _remove(root)


def _prepared(root: Path, output: Path, basis: Mapping[str, Any], fresh: bool) -> Workspace:
    """Read the journal, and make the directories for a run that has something to do."""
    if fresh:
        (root / _JOURNAL).unlink(missing_ok=True)
    space = None
    try:
        space = Workspace(root, output, Journal(root / _JOURNAL, basis))
        if space.done is None:
            check_output(output)
            space.begin()
    except BaseException:
        if space is None or not space.resumed:
            _empty(root)
        raise
    return space


def _explain(space: Workspace, earlier: Mapping[str, Any] | None) -> None:
    """Say what became of an earlier run's work."""
    who = f"an earlier run ({holder(earlier)}) ended without finishing" if earlier else "an earlier run was interrupted"
    if space.journal.differs:
        keys = ", ".join(space.journal.differs)
        _log.warning("%s, and was of another command or model (%s): starting over", who, keys)
    elif space.resumed:
        _log.warning("%s: going on from what it finished (--fresh starts over)", who)


def _root(output: Path) -> Path:
    return output.absolute().with_name(f".{output.absolute().name}.partial")


def _check_root(root: Path) -> None:
    """Refuse a place that is somebody else's: what is in a workspace may be removed.

    Raises:
        UsageError: It is a link, a file, or holds what no workspace does.
    """
    ours = {_LOCK, _JOURNAL, _RESULT, _STATE, _SCRATCH}
    taken = root.is_symlink() or (root.exists() and not root.is_dir())
    if taken or (root.is_dir() and any(path.name not in ours for path in root.iterdir())):
        raise UsageError(
            "something is in the place where the work would be", where=str(root), hint="move it, or choose another -o"
        )


def _remove_ours(path: Path) -> None:
    """Remove a scratch directory that a journal names, if it is one: nothing else, whatever it says."""
    if path.name.startswith(_PREFIX) and path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.getuid():
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_all(space: Workspace) -> None:
    _remove(space.scratch)
    _empty(space.root)


def _empty(root: Path) -> None:
    """Remove a workspace; the lock goes last, and another run that takes the place at that moment keeps it."""
    for path in root.iterdir():
        if path.name != _LOCK:
            _remove(path)
    (root / _LOCK).unlink(missing_ok=True)
    with suppress(OSError):
        root.rmdir()


def _missing_parents(path: Path) -> list[Path]:
    """Return the directories above ``path`` that do not exist yet, the nearest first."""
    return [parent for parent in path.absolute().parents if not parent.exists()]


def _remove_empty(directories: list[Path]) -> None:
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()
