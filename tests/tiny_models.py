"""Tiny random models of every decoder family, saved as transformers saves them, and their graph skeletons."""

from __future__ import annotations

import hashlib
import shutil
import warnings
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


FAMILIES = ("llama", "llama-untied", "mistral", "phi3", "phi3-longrope", "gpt2")


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


def save_tiny_model(name: str, directory: Path, **changes: Any) -> Path:
    """Save a tiny random model of a family, with a tokenizer; ``changes`` go into the config."""
    import torch
    import transformers

    config, architecture = _config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    config.architectures = [architecture]
    torch.manual_seed(7)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "ln_" in parameter_name or parameter_name.endswith("bias"):
                # transformers starts norms at one and biases at zero, which would hide a mixed-up one.
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    build_tokenizer(directory)
    return directory


class Skeletons:
    """Graph skeletons built in this process and kept: the worker spends eight seconds on its imports for each.

    ``tests/graph/test_skeleton.py`` holds the worker to the same bytes, family by family.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def build(self, config_directory: Path, output: Path, *, environment: Any = None) -> None:
        """Stand in for :func:`compress.graph.skeleton.build_skeleton`."""
        from compress.graph import skeleton

        config = (config_directory / "config.json").read_bytes()
        kept = self._directory / f"{hashlib.sha256(config).hexdigest()}.onnx"
        if not kept.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the worker's warnings end in its log
                skeleton._work(str(config_directory), str(kept))
        shutil.copyfile(kept, output)
