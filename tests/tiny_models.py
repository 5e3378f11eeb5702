"""Tiny random models of every family and task, saved as transformers saves them, and their graph skeletons."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import string
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

#: Short enough that the tests' sequences run past it.
SLIDING_WINDOW = 12
VOCABULARY = 384
#: LongRoPE changes its factors beyond this length; the parity test runs across it.
LONG_ROPE_SWITCH = 32

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Wider than the usual 0.02: logits that differ enough for a wrong graph to show.
    "initializer_range": 0.12,
}


def _config(name: str) -> tuple[Any, str]:
    import transformers

    if name == "llama":
        return transformers.LlamaConfig(**{**_SHAPE, "tie_word_embeddings": True}), "LlamaForCausalLM"
    if name == "llama-untied":
        return transformers.LlamaConfig(**{**_SHAPE, "attention_bias": True, "head_dim": 32}), "LlamaForCausalLM"
    if name == "mistral":
        return transformers.MistralConfig(**_SHAPE, sliding_window=SLIDING_WINDOW), "MistralForCausalLM"
    if name == "phi3":
        return transformers.Phi3Config(**_SHAPE, sliding_window=SLIDING_WINDOW), "Phi3ForCausalLM"
    if name == "phi3-longrope":
        scaling = {
            "rope_type": "longrope",
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + 0.5 * i for i in range(8)],
            "rope_theta": 10000.0,
            "original_max_position_embeddings": LONG_ROPE_SWITCH,
            "factor": 256 / LONG_ROPE_SWITCH,
        }
        shape = {**_SHAPE, "original_max_position_embeddings": LONG_ROPE_SWITCH}
        return transformers.Phi3Config(**shape, rope_parameters=scaling), "Phi3ForCausalLM"
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=3,
            n_head=4,
            n_positions=256,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.12,
        )
        return config, "GPT2LMHeadModel"
    raise KeyError(name)


#: What makes a decoder's cache one of bytes, beside a profile.
INT8_CACHE = (
    "graph.cache_type=int8",
    "quantize.effort=balanced",
    "calibration.tokens=1024",
    "calibration.window=64",
    'targets=["genai"]',
)
#: Decoders.
FAMILIES = ("llama", "llama-untied", "mistral", "phi3", "phi3-longrope", "gpt2")

#: Positions of the tiny encoders: sequences of that length fill the table.
POSITIONS = 64
LABELS = {
    "text-classification": ("negative", "neutral", "positive"),
    "token-classification": ("O", "B-NAME", "I-NAME"),
}
ENCODER_STEMS = {"bert": "Bert", "distilbert": "DistilBert", "albert": "Albert", "electra": "Electra"}
TASK_SUFFIXES = {
    "embedding": "Model",
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "fill-mask": "ForMaskedLM",
}
#: An integer profile that does not run the model first.
PLAIN_INT8 = str(Path(__file__).with_name("plain-int8.toml"))
#: Every encoder family with every task, as ``family:task``.
ENCODERS = tuple(f"{family}:{task}" for family in ENCODER_STEMS for task in TASK_SUFFIXES)
_ENCODER_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "initializer_range": 0.12,
}
#: What differs from it: DistilBERT's own words, ALBERT's and ELECTRA's narrower embedding (ALBERT's layers share).
_ENCODER_CHANGES: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 64, "hidden_dim": 160, "n_layers": 3, "n_heads": 4},
    "albert": {"embedding_size": 32},
    "electra": {"embedding_size": 32},
}


def _encoder_config(name: str) -> tuple[Any, str]:
    from transformers import AutoConfig

    family, _, task = name.partition(":")
    shape: dict[str, Any] = {**_ENCODER_SHAPE, **_ENCODER_CHANGES.get(family, {})}
    if family == "distilbert":
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            del shape[key]
    if task in LABELS:
        shape["id2label"] = dict(enumerate(LABELS[task]))
        shape["label2id"] = {label: index for index, label in enumerate(LABELS[task])}
    return AutoConfig.for_model(family, **shape), f"{ENCODER_STEMS[family]}{TASK_SUFFIXES[task]}"


def build_tokenizer(directory: Path, vocabulary: int = VOCABULARY) -> None:
    """Write a byte-level BPE tokenizer whose ids all lie below ``vocabulary``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    from pydoc_data.topics import topics

    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)[:8]], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


def build_wordpiece_tokenizer(directory: Path, vocabulary: int = VOCABULARY, longest: int = POSITIONS) -> None:
    """Write a lower-case WordPiece tokenizer with BERT's special tokens and exactly ``vocabulary`` ids.

    Single characters, their continuations, then the most frequent words of a text that ships with Python.
    """
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    signs = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = [*special, *signs, *(f"##{sign}" for sign in string.ascii_lowercase + string.digits)]
    text = " ".join(topics[name] for name in sorted(topics)[:8]).lower()
    counts = Counter("".join(sign if sign.isalpha() else " " for sign in text).split())
    words = sorted((word for word in counts if len(word) > 1 and word.isascii()), key=lambda w: (-counts[w], w))
    pieces += words[: vocabulary - len(pieces)]
    assert len(pieces) == vocabulary == len(set(pieces))
    ids = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, ids[name]) for name in ("[CLS]", "[SEP]")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=longest,
        **{f"{name.strip('[]').lower()}_token": name for name in special},
    ).save_pretrained(directory)


def add_sentence_transformers(directory: Path, mode: str = "mean", *, normalize: bool = True) -> Path:
    """Add the files that make a saved model's directory one of sentence-transformers; returns it."""
    names = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{name}" if index else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for index, name in enumerate(names)
    ]
    for index, name in enumerate(names[1:], 1):
        (directory / f"{index}_{name}").mkdir()
    config = json.loads((directory / "config.json").read_text())
    pooling = {
        "word_embedding_dimension": config.get("hidden_size", config.get("dim")),
        "pooling_mode_cls_token": mode == "cls",
        "pooling_mode_mean_tokens": mode == "mean",
        "pooling_mode_max_tokens": mode == "max",
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')
    return directory


def save_tiny_model(name: str, directory: Path, **changes: Any) -> Path:
    """Save a tiny random model, with a tokenizer; ``changes`` go into the config.

    ``name`` is a decoder's of :data:`FAMILIES` or an encoder's of :data:`ENCODERS`.
    """
    import torch
    import transformers

    encoder = ":" in name
    config, architecture = _encoder_config(name) if encoder else _config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    config.architectures = [architecture]
    torch.manual_seed(7)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name.lower() or "ln_" in parameter_name or parameter_name.endswith("bias"):
                # transformers starts norms at one and biases at zero, which would hide a mixed-up one.
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    if encoder:
        build_wordpiece_tokenizer(directory)
    else:
        build_tokenizer(directory)
    return directory


class Skeletons:
    """Graph skeletons built in one process beside this one and kept: a worker for each spends eight seconds on imports.

    Beside, not inside: exports build them in a thread while tests load models in another, and transformers turns the
    tying of weights off, for the whole process, as long as any model is being loaded.

    They are kept from run to run, under a name that changes with what they are made of: config, task, the code that
    builds them and the libraries' versions. ``tests/graph/test_skeleton.py`` holds the worker to the same bytes.
    """

    def __init__(self, directory: Path) -> None:
        from compress.graph import encoder_skeleton, skeleton

        self._directory = directory
        sources = [Path(module.__file__ or "").read_bytes() for module in (skeleton, encoder_skeleton)]
        libraries = ("torch", "transformers", "onnxscript", "onnx-ir", "optimum", "mobius-onnx")
        versions = " ".join(importlib.metadata.version(name) for name in libraries)
        self._made_by = b"".join([*sources, versions.encode()])
        self._builder: ProcessPoolExecutor | None = None

    def close(self) -> None:
        """End the process that builds, if there is one."""
        if self._builder is not None:
            self._builder.shutdown()

    def build(self, config_directory: Path, output: Path, task: str = "", *, environment: Any = None) -> None:
        """Stand in for :func:`compress.graph.skeleton.build_skeleton`."""
        from compress.graph import skeleton

        config = (config_directory / "config.json").read_bytes()
        digest = hashlib.sha256(b"\0".join([self._made_by, config, task.encode()])).hexdigest()
        kept = self._directory / f"{digest}.onnx"
        if not kept.exists():
            fresh = self._directory / f"{digest}-{os.getpid()}.onnx"  # another run may be at the same one
            if self._builder is None:
                self._builder = ProcessPoolExecutor(
                    1, multiprocessing.get_context("spawn"), warnings.simplefilter, ("ignore",)
                )
            self._builder.submit(skeleton._work, str(config_directory), str(fresh), task).result()
            fresh.replace(kept)
        shutil.copyfile(kept, output)
