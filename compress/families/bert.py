"""BERT, and what was distilled into its shape: MiniLM, TinyBERT."""

from compress.families._bidirectional import BidirectionalFamily, FillMask, Names

NAMES = Names(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    output_norm="output.LayerNorm",
)

FAMILY = BidirectionalFamily(
    "bert",
    "Bert",
    block="encoder.layer.{}".format,
    names=NAMES,
    pooler="pooler.dense",
    fill_mask=FillMask(
        dense="cls.predictions.transform.dense",
        norm="cls.predictions.transform.LayerNorm",
        decoder="cls.predictions.decoder",
        bias="cls.predictions.bias",
    ),
    refuse={
        "position_embedding_type": (("absolute",), "absolute"),
        "is_decoder": ((False,), False),
        "add_cross_attention": ((False,), False),
    },
)
