"""An encoder's blocks, visited one after the other as a decoder's are (:mod:`compress.validation.streaming`).

The model is held whole, in float32: encoders are small, and the plan counts it (decision 0010). Blocks are found by the
linears that the family describes, so a block that is run several times (ALBERT) is visited that often.
"""

from __future__ import annotations

from typing import Any

import torch

from compress.contracts import Checkpoint, Encoder
from compress.prune.cuts import common_prefix
from compress.validation.encoded import Batch
from compress.validation.encoder_reference import load_model
from compress.validation.streaming import Visit, sliced


class EncoderBlocks:
    """A checkpoint's encoder; see the module.

    Raises:
        ResourceError: It does not fit in ``memory_cap`` bytes.
        SourceError: The checkpoint lacks weights.
    """

    def __init__(self, checkpoint: Checkpoint, structure: Encoder, memory_cap: int | None = None) -> None:
        self.model = load_model(checkpoint, memory_cap)
        self._structure = structure
        modules = dict(self.model.named_modules())
        count = 1 + max(linear.layer for linear in structure.linears if linear.layer is not None)
        self._blocks: list[torch.nn.Module] = []
        self._places: dict[str, tuple[torch.nn.Module, str]] = {}
        for index in range(count):
            linears = [linear for linear in structure.linears if linear.layer == index]
            names = [name for linear in linears for name in (*linear.graph_weights, *linear.graph_biases)]
            self._blocks.append(modules[common_prefix(names).removesuffix(".")])
            for linear in linears:
                pairs = zip(linear.weight, linear.graph_weights, strict=True)
                pairs_of_biases = zip(linear.bias, linear.graph_biases, strict=True)
                for piece, name in (*pairs, *pairs_of_biases):
                    owner, _, parameter = name.rpartition(".")
                    self._places[piece.tensor] = modules[owner], parameter

    def parameters_of(self, layer: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, str]]:
        """Return where a block keeps each of its linears' tensors: module and parameter, by tensor name."""
        inside = {id(module) for module in layer.modules()}
        return {name: place for name, place in self._places.items() if id(place[0]) in inside}

    def each(self, visit: Any) -> None:
        """Call ``visit`` with every block's index and module; nothing is run."""
        for index, block in enumerate(self._blocks):
            visit(index, block)

    @torch.no_grad()
    def visit_blocks(self, batch: Batch, visit: Visit, progress: Any = None) -> None:
        """Run a padded batch through the model; ``visit`` gives each run's outputs, counted as the runs are."""
        runs = 0

        def visited(block: torch.nn.Module) -> Any:
            run = type(block).forward

            def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                nonlocal runs

                def call(some: torch.Tensor, rows: slice) -> torch.Tensor:
                    batch = hidden.shape[0]
                    out = run(block, some, *sliced(args, rows, batch), **sliced(kwargs, rows, batch))
                    first: torch.Tensor = out[0] if isinstance(out, tuple) else out
                    return first

                result = visit(runs, block, call, hidden)
                runs += 1
                if progress is not None:
                    progress(runs / self._structure.layers)
                return result

            return forward

        for block in self._blocks:
            block.forward = visited(block)
        given = {"input_ids": torch.from_numpy(batch.ids), "attention_mask": torch.from_numpy(batch.mask)}
        if "token_type_ids" in self._structure.inputs:
            given["token_type_ids"] = torch.from_numpy(batch.types)
        try:
            self.model(**given)
        finally:
            for block in self._blocks:
                del block.forward
