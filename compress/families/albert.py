"""ALBERT: one block run many times, over an embedding of its own width."""

from collections.abc import Mapping
from typing import Any

from compress.families._bidirectional import BidirectionalFamily, FillMask, Names, Shape
from compress.families._reading import dimension


def _groups(shape: Shape, config: Mapping[str, Any]) -> int:
    """Return how many different blocks there are; the layers are divided among them evenly."""
    return dimension(config, "num_hidden_groups", 1, most=shape.layers)


FAMILY = BidirectionalFamily(
    "albert",
    "Albert",
    block="encoder.albert_layer_groups.{}.albert_layers.0".format,
    stored_layers=_groups,
    names=Names(
        query="attention.query",
        key="attention.key",
        value="attention.value",
        attention_output="attention.dense",
        attention_norm="attention.LayerNorm",
        up="ffn",
        down="ffn_output",
        output_norm="full_layer_layer_norm",
    ),
    projection="encoder.embedding_hidden_mapping_in",
    always_projected=True,
    pooler="pooler",
    fill_mask=FillMask(
        dense="predictions.dense",
        norm="predictions.LayerNorm",
        decoder="predictions.decoder",
        bias="predictions.bias",
    ),
    refuse={
        "position_embedding_type": (("absolute",), "absolute"),
        "inner_group_num": ((1,), 1),
    },
)
