"""What a packaging target is given, and what it says it needs before work starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.contracts import Checkpoint, Structure
from compress.planning import Plan
from compress.profile import Profile


@dataclass(frozen=True)
class Wish:
    """What an export is going to make, known before any weight is read.

    Attributes:
        checkpoint: The source; its side files are what the target may copy or read.
        plan: How every tensor will be stored.
        profile: The recipe.
    """

    checkpoint: Checkpoint
    plan: Plan
    profile: Profile

    @property
    def structure(self) -> Structure:
        """Return the model's structure."""
        return self.plan.structure


@dataclass(frozen=True)
class Package(Wish):
    """An artifact that has its graph, weights and side files, and gets what a runtime wants beside them.

    Attributes:
        directory: The artifact; ``model.onnx`` and its data are there, no manifest yet.
        inputs: The graph's input names.
    """

    directory: Path
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Needs:
    """What a target takes beside the graph and its weights, bytes: on the disk for good, and of memory for a moment."""

    disk: int = 0
    memory: int = 0
