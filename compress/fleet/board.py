"""The state of a sweep while it runs: every change is in the journal before the next step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from compress.errors import CompressError, ResourceError
from compress.fleet import journal
from compress.fleet.model import JobRecord, Outcome, Sweep
from compress.fleet.place import Place
from compress.fleet.process import Ended
from compress.report.environment import created
from compress.report.wording import seconds, visible
from compress.sizes import format_size


class Board:
    """Records by job, in the grid's order."""

    def __init__(self, sweep: Sweep, place: Place, say: Callable[[str], None]) -> None:
        """Begin with what is known.

        Args:
            sweep: Every job's record.
            place: Where the journal is written.
            say: Takes a line for whoever is watching.
        """
        self._sweep, self._place, self.say = sweep, place, say
        self._records = {job.name: job for job in sweep.jobs}

    def __getitem__(self, name: str) -> JobRecord:
        return self._records[name]

    @property
    def sweep(self) -> Sweep:
        """Return all of it as it is now."""
        return self._sweep.model_copy(update={"jobs": tuple(self._records.values()), "created": created()})

    def waiting(self) -> list[str]:
        """Return the jobs that are to be run."""
        return [name for name, job in self._records.items() if job.state == "waiting"]

    def save(self, *, send: bool = False) -> None:
        """Write the journal; ``send`` it to the store as well."""
        journal.write(self.sweep, self._place.desk)
        if send and self._place.store is not None:
            self._place.store.write(journal.NAME, journal.dumps(self.sweep).encode())

    def note(self, name: str, **changes: Any) -> None:
        """Change a record; the journal is not written yet."""
        self._records[name] = self._records[name].model_copy(update=changes)

    def started(self, name: str, how: str = "started") -> int:
        """Note that an attempt begins, and return its number."""
        attempt = self._records[name].attempts + 1
        self.note(name, state="running", attempts=attempt, exit_code=None, error=None)
        self.save()
        self.say(f"{self._count()} {name}: {how}{f', attempt {attempt}' if attempt > 1 else ''}")
        return attempt

    def stopped(self, names: Iterable[str]) -> None:
        """Note that jobs were ended before they were done."""
        for name in names:
            self.note(name, state="waiting", attempts=max(0, self._records[name].attempts - 1))
        self.save()

    def done(self, name: str, outcome: Outcome, ended: Ended | None) -> None:
        """Note what a job left; ``ended`` is ``None`` where its end was not seen."""
        how = {} if ended is None else {"seconds": ended.seconds, "machine": ended.machine}
        self.note(name, state="done", outcome=outcome, exit_code=outcome.exit_code, error=None, **how)
        self.save(send=True)
        took = "" if ended is None or ended.seconds is None else f" in {seconds(ended.seconds)}"
        self.say(f"{self._count()} {name}: {outcome.status}, {format_size(outcome.model_bytes)}{took}")

    def failed(self, name: str, error: str | None, ended: Ended | None) -> None:
        """Note that a job left nothing."""
        how = {} if ended is None else {"seconds": ended.seconds, "machine": ended.machine, "exit_code": ended.code}
        self.note(name, state="failed", error=error, **how)
        self.save(send=True)
        first = visible((error or "no reason was given").splitlines()[0])
        self.say(f"{self._count()} {name}: failed: {first}")

    def refused(self, name: str, error: CompressError) -> None:
        """Note that a job is not begun: it would not fit, or cannot be."""
        state = "refused" if isinstance(error, ResourceError) else "failed"
        self.note(name, state=state, error=str(error), exit_code=error.exit_code)
        self.say(f"{self._count()} {name}: {state}: {visible(error.what)}")

    def _count(self) -> str:
        over = sum(job.state in ("done", "failed", "refused") for job in self._records.values())
        return f"[{over}/{len(self._records)}]"
