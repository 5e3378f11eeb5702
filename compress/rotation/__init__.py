"""Rotations folded into a decoder's weights: the same function, without channels that are larger than the others.

8-bit products have one range for all channels of their inputs, and in a trained model a few channels are a hundred
times larger than the rest. An orthogonal change of basis spreads them over all channels and changes nothing else:
Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024 (arXiv:2404.00456). See
:mod:`compress.rotation.structure` for what is rotated, :mod:`compress.rotation.view` for how weights are read.
"""

from __future__ import annotations

from compress.rotation.structure import rotated
from compress.rotation.view import RotatedCheckpoint, applied

__all__ = ["RotatedCheckpoint", "applied", "rotated"]
