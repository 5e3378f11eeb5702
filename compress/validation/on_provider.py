"""Where an artifact runs: the provider's own runtime, its options, and the static check where there is no session.

What a provider does wrong (it is missing, refuses the graph, crashes, hangs, leaves nodes to another) is told apart
from what the artifact does wrong: the command line ends with 4 for the one and with 3 for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from compress import providers
from compress.contracts import Runtime, StaticallyChecked
from compress.errors import CompressError, ProviderError, WorkerError
from compress.validation.artifact import Artifact
from compress.validation.in_pieces import PIECE_NAME
from compress.validation.protocol import Json, run_worker

REFERENCE = "cpu"
"""The provider that the others are compared with."""


@dataclass(frozen=True)
class Terms:
    """What a profile says of running on providers.

    Attributes:
        options: Provider options by provider.
        allowed_fallback: Operator types that may run elsewhere without failing the verdict.
    """

    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    allowed_fallback: tuple[str, ...] = ()

    def forbidden(self, fallback_nodes: Sequence[str]) -> list[str]:
        """Return the entries of a placement's ``fallback_nodes`` that are not allowed."""
        return [node for node in fallback_nodes if _operator(node) not in self.allowed_fallback]


def _operator(entry: str) -> str:
    """Return the operator type of a placement's entry, ``NAME (TYPE) on ...``; names are the graph's, hence hostile."""
    return entry.rpartition("(")[2].partition(")")[0]


def runtime_of(name: str) -> Runtime | None:
    """Return a provider's runtime, ``None`` where only a static check of the graph can be had.

    Raises:
        ProviderError: It does not work here; with the remedy.
        UsageError: There is no such provider.
    """
    provider = providers.load(name)
    try:
        return provider.runtime()
    except ProviderError as error:
        if isinstance(provider, StaticallyChecked):
            return None
        raise ProviderError(
            f"the {provider.name} provider does not work here: {error.what}", where=error.where, hint=error.hint
        ) from None


def require(names: Sequence[str]) -> None:
    """Refuse providers that do not work here, before work starts.

    Raises:
        ProviderError: With the reason and the remedy; exit code 4.
    """
    for name in names:
        runtime_of(name)


def run_artifact(
    artifact: Artifact,
    provider: str,
    jobs: list[Json],
    threads: int,
    timeout: float,
    progress: Callable[[float], None],
) -> Json:
    """Run jobs on an artifact in a worker of its own and return its answer; no jobs only load it.

    Raises:
        CompressError: The worker failed; :func:`is_the_providers` tells whose fault it is.
    """
    request = {
        "model": str(artifact.model),
        "provider": provider,
        "session_options": artifact.session_options,
        "provider_options": dict(artifact.provider_options.get(provider, {})),
        "threads": threads,
        "jobs": jobs,
        "in_pieces": artifact.in_pieces,
    }
    try:
        return run_worker("worker", request, timeout=timeout, runtime=runtime_of(provider), progress=progress)
    finally:
        if artifact.in_pieces:  # a worker that was killed leaves it
            artifact.model.with_name(PIECE_NAME).unlink(missing_ok=True)


def check_statically(artifact: Artifact, provider: str, timeout: float) -> Json:
    """Return the answer of a worker that reads the graph only: ``placement``, ``evidence``, ``device``."""
    request = {"model": str(artifact.model), "provider": provider, "threads": 1, "jobs": []}
    return run_worker("static_worker", request, timeout=timeout)


def is_the_providers(provider: str, error: CompressError) -> bool:
    """Return whether a failure on a provider is the provider's, as far as that can be told: the CPU runs anything."""
    return provider != REFERENCE and isinstance(error, ProviderError | WorkerError)
