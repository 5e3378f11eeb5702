"""DistilBERT: BERT without segments and pooler."""

from compress.families._bidirectional import BidirectionalFamily, FillMask, Names

FAMILY = BidirectionalFamily(
    "distilbert",
    "DistilBert",
    block="transformer.layer.{}".format,
    names=Names(
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        output_norm="output_layer_norm",
    ),
    keys={
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
    },
    types=False,
    classifier=(("pre_classifier", "pooler"), ("classifier", "classifier")),
    fill_mask=FillMask(
        dense="vocab_transform", norm="vocab_layer_norm", decoder="vocab_projector", bias="vocab_projector.bias"
    ),
)
