"""Adam with a clipped gradient, a tensor at a time, so that its sums do not depend on how many threads there are.

Kingma, Ba, "Adam", arXiv:1412.6980 (2015); clipping by the norm of all gradients: Pascanu et al., arXiv:1211.5063.
Without weight decay: a few hundred steps shrink nothing worth shrinking, and zeros stay zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from compress.calibrate.blocks import Workers

BETAS = (0.9, 0.98)
EPSILON = 1e-8
#: The greatest norm of all gradients together.
CLIP = 1.0

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Adam:
    """Weights and their moments, by name; all float32 and of the same shapes, changed in place.

    ``frozen`` are bool tensors, true where a weight stays what it is.
    """

    weights: Tensors
    means: Tensors
    squares: Tensors
    frozen: Tensors

    @classmethod
    def of(cls, weights: Tensors, frozen: Tensors) -> Adam:
        """Begin with moments of zero."""
        means, squares = ({name: torch.zeros_like(item) for name, item in weights.items()} for _ in range(2))
        return cls(weights, means, squares, frozen)

    def update(self, gradients: Tensors, step: int, rate: float, workers: Workers) -> float:
        """Change the weights.

        Args:
            gradients: By name; they are overwritten.
            step: The first is 1.
            rate: Learning rate.
            workers: Threads; a tensor is one thread's work.

        Returns:
            The norm of the gradients before clipping.
        """

        def norm(name: str) -> float:
            if name in self.frozen:
                gradients[name].masked_fill_(self.frozen[name], 0.0)
            return float(torch.linalg.vector_norm(gradients[name]))

        def change(name: str) -> None:
            gradient, mean, square = gradients[name].mul_(scale), self.means[name], self.squares[name]
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            torch.sqrt(square, out=gradient).div_(math.sqrt(1 - BETAS[1] ** step)).add_(EPSILON)
            self.weights[name].addcdiv_(mean, gradient, value=-rate / (1 - BETAS[0] ** step))

        total = math.hypot(*workers.map(norm, self.weights))
        if not math.isfinite(total):
            return total
        scale = min(1.0, CLIP / max(total, 1e-12))
        workers.map(change, self.weights)
        return total
