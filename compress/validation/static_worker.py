"""The worker that reads a graph with a provider's operator lists: ``python -m compress.validation.static_worker``.

Request: ``model``, ``provider``. Nothing is run: the answer has no results, and its evidence is ``static``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from compress import providers
from compress.contracts import StaticallyChecked
from compress.errors import CompressError, ProviderError
from compress.validation.protocol import Json, peak_rss_bytes, serve
from compress.validation.worker import versions


def handle(request: Json, job: Path) -> Json:
    """Read the graph."""
    provider = providers.load(str(request["provider"]))
    if not isinstance(provider, StaticallyChecked):
        raise ProviderError(f"the {provider.name} provider has no operator lists")
    model = Path(request["model"])
    if not model.is_file():
        raise CompressError("there is no such model file", where=str(model))
    return {
        "results": [],
        "placement": dict(provider.static_placement(model)),
        "evidence": "static",
        "device": "none: the operators were looked up",
        "versions": versions(),
        "peak_rss_bytes": peak_rss_bytes(),
    }


if __name__ == "__main__":
    sys.exit(serve(handle))
