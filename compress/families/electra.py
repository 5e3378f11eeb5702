"""ELECTRA: BERT's blocks over an embedding of its own width; the discriminator is the model."""

from compress.families._bidirectional import BidirectionalFamily, FillMask
from compress.families.bert import NAMES

FAMILY = BidirectionalFamily(
    "electra",
    "Electra",
    block="encoder.layer.{}".format,
    names=NAMES,
    projection="embeddings_project",
    classifier=(("classifier.dense", "pooler"), ("classifier.out_proj", "classifier")),
    fill_mask=FillMask(
        dense="generator_predictions.dense",
        norm="generator_predictions.LayerNorm",
        decoder="generator_lm_head",
        bias="generator_lm_head.bias",
    ),
    refuse={
        "position_embedding_type": (("absolute",), "absolute"),
        "is_decoder": ((False,), False),
        "add_cross_attention": ((False,), False),
    },
)
