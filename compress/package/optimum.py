"""Target ``optimum``: the directory loads in optimum's ``ORTModelFor...`` classes as it is.

optimum lives on transformers 4, which takes the graph's names and the config but not every tokenizer that transformers 5
saves. A graph of static shapes is none that optimum could feed.
"""

from __future__ import annotations

from compress.contracts import Structure
from compress.errors import UsageError
from compress.package.portable_tokenizer import make_portable
from compress.package.target import Needs, Package, Wish

TARGET = "optimum"


def applies(structure: Structure) -> bool:
    """Return whether the target can take such a model: any."""
    return True


def check(wish: Wish) -> None:
    """Refuse a graph of static shapes.

    Raises:
        UsageError: The profile asks for one.
    """
    if wish.profile.graph.static_length is not None:
        raise UsageError(
            "optimum feeds graphs of any length, and the profile's has one (graph.static_length)",
            where=f"profile {wish.profile.name}",
            hint='leave "optimum" out of targets',
        )


def needs(wish: Wish) -> Needs:
    """Return what it takes beside the model: nothing."""
    return Needs()


def write(package: Package) -> None:
    """Make the tokenizer's files ones that transformers 4 reads."""
    make_portable(package.directory)
