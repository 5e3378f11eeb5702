"""What an embedding is: the profile's choice, or what the model's own directory says."""

from __future__ import annotations

from dataclasses import replace

from compress.contracts import Checkpoint, Encoder, Structure
from compress.profile import Profile
from compress.source.sentence_transformers import Pooling, read_pooling

#: Without a word from profile or model: the mean over the tokens, of unit length. It is what most small sentence
#: encoders were trained for, and what a base model's states bear best.
DEFAULT = Pooling(mode="mean", normalize=True, max_length=None, lowercase=False)
NONE = Pooling(mode="none", normalize=False, max_length=None, lowercase=False)


def resolve(structure: Structure, profile: Profile, checkpoint: Checkpoint) -> Pooling | None:
    """Return how an encoder's states become one vector; ``None`` for a decoder, mode ``none`` for other tasks.

    Raises:
        SourceError: The sentence-transformers files are damaged.
        UnsupportedModelError: They ask for a module that has no implementation.
    """
    if not isinstance(structure, Encoder):
        return None
    if structure.task != "embedding":
        return NONE
    mode, normalize = profile.graph.pooling, profile.graph.normalize
    # What is overridden whole is not read: a directory with an unknown module can still be exported.
    found = DEFAULT if mode != "auto" and normalize != "auto" else read_pooling(checkpoint) or DEFAULT
    if mode != "auto":
        found = replace(found, mode=mode)
    if normalize != "auto":
        found = replace(found, normalize=normalize == "yes")
    return found
