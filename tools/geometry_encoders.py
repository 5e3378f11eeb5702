"""Write a random-weight encoder with the exact shape of a real one: ``geometry_encoders.py minilm OUT [--task NAME]``.

As geometry.py does for decoders, and by its means: an ordinary Hugging Face directory, with the head of a task where
one is asked for, whose values look like a trained model's to a quantizer but have learnt nothing.

Names and shapes are those of the transformers class itself, made without storage; what transformers 5 saves is exactly
its parameters, a tied weight once. In a trained encoder a few channels of the hidden state are many times larger than
the rest, the same in every layer: what writes into the hidden state has larger rows there, the tables larger columns,
and the normalisation after each block lets them through (in these models it comes after the sum, not before a block).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geometry import DTYPES, Spec, Weights, write_weights

_BERT: dict[str, Any] = {
    "model_type": "bert",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}

# The published config.json of each model; the architecture is added by the task.
CONFIGS: dict[str, dict[str, Any]] = {
    "minilm": _BERT | {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6},
    "tinybert": _BERT | {"emb_size": 312, "hidden_size": 312, "intermediate_size": 1200, "num_hidden_layers": 4},
    "distilbert": {
        "model_type": "distilbert",
        "activation": "gelu",
        "attention_dropout": 0.1,
        "dim": 768,
        "dropout": 0.1,
        "hidden_dim": 3072,
        "initializer_range": 0.02,
        "max_position_embeddings": 512,
        "n_heads": 12,
        "n_layers": 6,
        "pad_token_id": 0,
        "qa_dropout": 0.1,
        "seq_classif_dropout": 0.2,
        "sinusoidal_pos_embds": False,
        "tie_weights_": True,
        "vocab_size": 30522,
    },
    "albert": {
        "model_type": "albert",
        "attention_probs_dropout_prob": 0,
        "bos_token_id": 2,
        "classifier_dropout_prob": 0.1,
        "down_scale_factor": 1,
        "embedding_size": 128,
        "eos_token_id": 3,
        "gap_size": 0,
        "hidden_act": "gelu_new",
        "hidden_dropout_prob": 0,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "inner_group_num": 1,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "net_structure_type": 0,
        "num_attention_heads": 12,
        "num_hidden_groups": 1,
        "num_hidden_layers": 12,
        "num_memory_blocks": 0,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": 30000,
    },
    "electra": {
        "model_type": "electra",
        "attention_probs_dropout_prob": 0.1,
        "embedding_size": 128,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 1024,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 12,
        "pad_token_id": 0,
        "summary_activation": "gelu",
        "summary_last_dropout": 0.1,
        "summary_type": "first",
        "summary_use_proj": True,
        "type_vocab_size": 2,
        "vocab_size": 30522,
    },
}
_PREFIX = {"bert": "Bert", "distilbert": "DistilBert", "albert": "Albert", "electra": "Electra"}
TASKS = {
    "embedding": "Model",
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "fill-mask": "ForMaskedLM",
}
LABELS = {
    "text-classification": ("NEGATIVE", "POSITIVE"),
    "token-classification": ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"),
}
# The matrices whose outputs are added to the hidden state, or make it, in all four families.
_WRITERS = (
    ".output.dense.weight",
    ".attention.dense.weight",
    ".out_lin.weight",
    ".lin2.weight",
    ".ffn_output.weight",
    "embedding_hidden_mapping_in.weight",
    "embeddings_project.weight",
)


def build_config(name: str, task: str) -> dict[str, Any]:
    """Return the config of a model with the head of a task."""
    config = dict(CONFIGS[name])
    config["architectures"] = [_PREFIX[config["model_type"]] + TASKS[task]]
    if task in LABELS:
        config["id2label"] = {str(index): label for index, label in enumerate(LABELS[task])}
        config["label2id"] = {label: index for index, label in enumerate(LABELS[task])}
    return config


def hidden_size(config: Mapping[str, Any]) -> int:
    """Return the width of the hidden state."""
    return int(config.get("hidden_size") or config["dim"])


def specs(config: Mapping[str, Any]) -> list[Spec]:
    """Return the tensors that transformers saves for a config, in its order."""
    import torch
    import transformers

    kind = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = kind(kind.config_class.from_dict(dict(config)))
    return [
        _spec(name, tuple(parameter.shape), hidden_size(config))
        # A tied weight is one parameter, which comes up once.
        for name, parameter in model.named_parameters()
    ]


def _spec(name: str, shape: tuple[int, ...], hidden: int) -> Spec:
    if len(shape) == 1:
        norm = "norm" in name.lower() and name.endswith("weight")
        return Spec(name, shape, "norm" if norm else "bias")
    if name.endswith(_WRITERS):
        return Spec(name, shape, channels=0)
    return Spec(name, shape, channels=1 if "embeddings." in name and shape[1] == hidden else None)


def write_tokenizer(directory: Path, config: Mapping[str, Any]) -> None:
    """Write a WordPiece tokenizer of the words of Python's own documentation, with the model's number of tokens.

    Special tokens have the ids they have in the published vocabularies. Ids that the words leave free are filler
    tokens, so that every id decodes to something.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    size, albert = config["vocab_size"], config["model_type"] == "albert"
    special = (
        {0: "<pad>", 1: "<unk>", 2: "[CLS]", 3: "[SEP]", 4: "[MASK]"}
        if albert
        else {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    )
    unknown = special[1 if albert else 100]
    names = {token: index for index, token in special.items()}
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    pieces = _pieces(normalizer, splitter, min(8192, size // 2))
    free = iter(index for index in range(size) if index not in special)
    vocab = names | {piece: next(free) for piece in pieces}
    vocab |= {f"[unused{index}]": index for index in free}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.WordPiece()
    tokenizer.add_special_tokens(list(names))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", names["[CLS]"]), ("[SEP]", names["[SEP]"])],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    segments = ["token_type_ids"] if "type_vocab_size" in config else []
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
        "pad_token": special[0],
        "unk_token": unknown,
        "model_input_names": ["input_ids", *segments, "attention_mask"],
        "model_max_length": config["max_position_embeddings"],
    }
    _dump(directory / "tokenizer_config.json", settings)


def _pieces(normalizer: Any, splitter: Any, count: int) -> list[str]:
    """Return the characters of the documentation, alone and inside a word, then its commonest words.

    Counted, not trained: the trainer breaks ties by the order of a hash table, so that no two runs agree.
    """
    from pydoc_data.topics import topics

    words: Counter[str] = Counter()
    for text in topics.values():
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    letters = sorted({letter for word in words for letter in word})
    common = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    return [*letters, *(f"##{letter}" for letter in letters), *common][:count]


def write_sentence_files(directory: Path, width: int) -> None:
    """Write what makes the directory one of sentence-transformers, as all-MiniLM-L6-v2 is published."""
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(kinds)
    ]
    _dump(directory / "modules.json", modules)
    _dump(directory / "sentence_bert_config.json", {"max_seq_length": 256, "do_lower_case": False})
    (directory / "1_Pooling").mkdir()
    modes = {"cls_token": False, "mean_tokens": True, "max_tokens": False, "mean_sqrt_len_tokens": False}
    pooling = {"word_embedding_dimension": width} | {f"pooling_mode_{name}": on for name, on in modes.items()}
    _dump(directory / "1_Pooling" / "config.json", pooling)


def _dump(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write(name: str, out: Path, *, task: str = "embedding", dtype: str = "f32", seed: int = 0) -> int:
    """Write the checkpoint into the new directory ``out`` and return the bytes of its weights.

    Args:
        name: A key of ``CONFIGS``; ``minilm`` with the task ``embedding`` is a sentence-transformers directory.
        out: A directory that does not exist, or is empty.
        task: A key of ``TASKS``.
        dtype: ``bf16``, ``f16`` or ``f32``.
        seed: The same seed gives the same bytes.
    """
    config = build_config(name, task)
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty\n  try: another directory, or delete it first")
    out.mkdir(parents=True, exist_ok=True)
    _dump(out / "config.json", config | {"torch_dtype": DTYPES[dtype][2]})
    write_tokenizer(out, config)
    width = hidden_size(config)
    if name == "minilm" and task == "embedding":
        write_sentence_files(out, width)
    return write_weights(out, specs(config), Weights(width, seed, dtype, tame=1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=sorted(CONFIGS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", choices=sorted(TASKS), default="embedding")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="f32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    total = write(options.model, options.out, task=options.task, dtype=options.dtype, seed=options.seed)
    print(f"{options.out}: {total / 1e6:.1f} MB in {time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
