"""Providers with planted faults, run by the real worker: ``python faulty_provider.py -P -m MODULE JOB PARENT``.

The fault is in the environment, ``PLANTED``: what a provider's library may do when a session is made or run.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress import providers
from compress.contracts import Evidence, Runtime
from compress.errors import ProviderError
from compress.providers.cpu import CpuProvider

NAME = "faulty"


class FaultyProvider(CpuProvider):
    """The CPU provider under another name, with one fault."""

    name = NAME
    onnxruntime_name = "CPUExecutionProvider"

    def __init__(self, fault: str, evidence: Evidence = "measured") -> None:
        self.fault, self._evidence = fault, evidence
        if fault == "fallback":
            self.onnxruntime_name = "FaultyExecutionProvider"

    def runtime(self) -> Runtime:
        """Return this file in front of the worker."""
        if self.fault == "missing":
            raise ProviderError("its library is not installed", hint="compress doctor --install faulty")
        environment = {"PLANTED": self.fault, "PLANTED_EVIDENCE": self._evidence}
        return Runtime((sys.executable, str(Path(__file__).resolve())), environment)

    def available(self) -> tuple[bool, str]:
        """Return that it is there."""
        return True, "planted"

    def evidence(self) -> Evidence:
        """Return what was planted."""
        return self._evidence

    def session(
        self, model: Path, options: Mapping[str, str], threads: int, provider_options: Mapping[str, str] | None = None
    ) -> Any:
        """Return a session, or do what was planted instead."""
        if self.fault == "crash":
            os.abort()
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "hang":
            print("waiting for a device", flush=True)
            time.sleep(600)
        if self.fault == "refuse":
            raise ProviderError("the graph has operators that it does not take: Softmax, Gather", where=str(model))
        session = CpuProvider().session(model, options, threads)
        return Garbage(session) if self.fault == "garbage" else session


class Garbage:
    """A session that answers noise."""

    def __init__(self, session: Any) -> None:
        self._session, self._noises = session, list[Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, names: Any, feeds: Any) -> list[Any]:
        """Return noise of the right shapes."""
        generator = np.random.default_rng(0)
        return [generator.standard_normal(array.shape).astype(array.dtype) for array in self._session.run(names, feeds)]

    def run_with_ort_values(self, names: Any, feeds: Any) -> list[Any]:
        """Return noise for the first output, the others as they are."""
        import onnxruntime as ort

        first, *rest = self._session.run_with_ort_values(names, feeds)
        # Kept: an OrtValue does not own the array that it was made from.
        self._noises.append(np.random.default_rng(0).standard_normal(first.shape()).astype(np.float32))
        return [ort.OrtValue.ortvalue_from_numpy(self._noises[-1]), *rest]


def planted(fault: str, evidence: Evidence = "measured") -> Callable[[str], Any]:
    """Return what replaces ``providers.load``: it knows one provider more."""
    original = providers.load
    return lambda name: FaultyProvider(fault, evidence) if name == NAME else original(name)


if __name__ == "__main__":
    evidence: Any = os.environ["PLANTED_EVIDENCE"]
    providers.load = planted(os.environ["PLANTED"], evidence)
    worker = importlib.import_module(sys.argv[3])
    sys.exit(worker.serve(worker.handle, sys.argv[4:]))
