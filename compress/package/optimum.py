"""Target ``optimum``: the directory loads in optimum's ``ORTModelFor...`` classes as it is.

optimum lives on transformers 4, which takes the graph's names and the config but not every tokenizer that
transformers 5 saves. A graph of static shapes is none that optimum could feed.
"""

from __future__ import annotations

from compress.contracts import Decoder, Structure
from compress.errors import UsageError
from compress.package.portable_tokenizer import make_portable
from compress.package.target import Needs, Package, Wish

TARGET = "optimum"
#: Model types whose ``num_key_value_heads`` optimum-onnx 0.1 reads, of those that can be exported here.
_GROUPED_TYPES = frozenset({"llama", "mistral"})


def applies(structure: Structure) -> bool:
    """Return whether the target can take such a model.

    optimum-onnx 0.1 makes the empty cache itself: as wide as the hidden size divided by the heads, whatever
    ``head_dim`` the config has, and of all heads unless it knows the model type to group them.
    """
    if not isinstance(structure, Decoder):
        return True
    groups = structure.kv_heads == structure.heads or structure.model_type in _GROUPED_TYPES
    return groups and structure.head_dim * structure.heads == structure.hidden_size


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
    if wish.plan.cache_type == "int8":
        raise UsageError(
            "optimum begins with an empty cache of floats, and the profile's keeps bytes (graph.cache_type)",
            where=f"profile {wish.profile.name}",
            hint='leave "optimum" out of targets',
        )


def needs(wish: Wish) -> Needs:
    """Return what it takes beside the model: nothing."""
    return Needs()


def write(package: Package) -> None:
    """Make the tokenizer's files ones that transformers 4 reads."""
    make_portable(package.directory)
