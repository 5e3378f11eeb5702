"""A tiny random BERT with every head: sources as transformers saves them, and a float graph of each task.

One export has all the heads; a task's graph is that one with the other outputs cut away.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

VOCAB, POSITIONS, LABELS = 400, 64, ("good", "bad", "other")
CLASSES = {
    "embedding": "BertModel",
    "text-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering",
    "fill-mask": "BertForMaskedLM",
}
#: What each task's outputs are called in the export of all heads.
OUTPUTS = {
    "embedding": {"last_hidden_state": "last_hidden_state", "sentence_embedding": "sentence_embedding"},
    "text-classification": {"sequence_logits": "logits"},
    "token-classification": {"token_logits": "logits"},
    "question-answering": {"start_logits": "start_logits", "end_logits": "end_logits"},
    "fill-mask": {"vocabulary_logits": "logits"},
}
_EXPORTED = [name for names in OUTPUTS.values() for name in names]


def build_wordpiece(directory: Path) -> None:
    """Write a WordPiece tokenizer as BERT's, with ``vocab.txt`` beside it."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # Not trained: ties are decided by hashes there, which every process has anew, and so would be what models answer.
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    counts = Counter(word for name in sorted(topics)[:8] for word, _ in split(topics[name].lower()))
    letters = sorted({letter for word in counts for letter in word})
    common = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    words = [*special, *letters, *(f"##{letter}" for letter in letters), *common][: VOCAB - 8]
    tokenizer.model = models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # As many published tokenizers are saved; what validation makes of texts must not depend on it.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(directory / "tokenizer.json"))
    by_id = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    (directory / "vocab.txt").write_text("\n".join(by_id) + "\n")
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    config = {**dict(zip(names, special, strict=True)), "tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def config(**changes: Any) -> Any:
    """The tiny model's config."""
    from transformers import BertConfig

    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.25,
        "id2label": dict(enumerate(LABELS)),
        "label2id": {name: index for index, name in enumerate(LABELS)},
        "attn_implementation": "eager",
    }
    return BertConfig(**{**settings, **changes})


def build(root: Path) -> None:
    """Make ``root/source/TASK`` and ``root/artifact/TASK`` for every task."""
    import torch
    import transformers

    torch.manual_seed(5)
    models: dict[str, Any] = {}
    for task, name in CLASSES.items():
        models[task] = getattr(transformers, name)(
            config(**({"id2label": {0: "start", 1: "end"}} if name.endswith("ing") else {}))
        ).eval()
    with torch.no_grad():
        for model in models.values():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms at one and biases at zero would hide a mixed-up one
                    parameter.add_(0.2 * torch.randn_like(parameter))
    base = models["embedding"]
    for task, model in models.items():
        if task != "embedding":
            model.bert.load_state_dict(base.state_dict(), strict=False)
            if task == "fill-mask":
                model.tie_weights()
        directory = root / "source" / task
        model.save_pretrained(directory)
        build_wordpiece(directory)
    _centre(models["text-classification"], root / "source" / "text-classification")
    exported = _export(models)
    for task, outputs in OUTPUTS.items():
        directory = root / "artifact" / task
        directory.mkdir(parents=True)
        for path in (root / "source" / task).iterdir():
            if path.suffix in (".json", ".txt"):
                shutil.copy(path, directory)
        model = ir.from_proto(copy.deepcopy(exported))
        by_name = dict(zip(_EXPORTED, model.graph.outputs, strict=True))
        model.graph.outputs.clear()
        for name, public in outputs.items():
            by_name[name].name = public
            model.graph.outputs.append(by_name[name])
        _remove_unused(model)
        ir.save(model, directory / "model.onnx")


def _centre(model: Any, directory: Path) -> None:
    """Let every label be the best one of some texts: a random head mostly says the same of all, whatever is wrong."""
    from pydoc_data.topics import topics

    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(24)
    texts = [line for name in sorted(topics)[8:20] for line in topics[name].splitlines() if len(line) > 40][:128]
    with torch.inference_mode():
        scores = [model(torch.tensor([tokenizer.encode(text).ids])).logits[0] for text in texts]
    with torch.no_grad():
        model.classifier.bias.sub_(torch.stack(scores).mean(0))
    model.save_pretrained(directory)


def _remove_unused(model: ir.Model) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)


def _export(models: dict[str, Any]) -> Any:
    """Export all heads at once and return the ONNX proto."""
    import torch

    class Heads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = models["embedding"]
            self.sequence = models["text-classification"].classifier
            self.token = models["token-classification"].classifier
            self.span = models["question-answering"].qa_outputs
            self.vocabulary = models["fill-mask"].cls

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            found = self.base(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=torch.arange(input_ids.shape[1])[None],
            )
            hidden = found.last_hidden_state
            weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * weights).sum(1) / weights.sum(1)
            start, end = self.span(hidden).split(1, dim=-1)
            return (
                hidden,
                torch.nn.functional.normalize(mean, dim=-1),
                self.sequence(found.pooler_output),
                self.token(hidden),
                start.squeeze(-1),
                end.squeeze(-1),
                self.vocabulary(hidden),
            )

    ids = torch.randint(0, VOCAB, (2, 9))
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Heads().eval(),
            (ids, torch.ones_like(ids), torch.zeros_like(ids)),
            dynamo=True,
            opset_version=18,
            input_names=["input_ids", "attention_mask", "token_type_ids"],
            output_names=_EXPORTED,
            dynamic_shapes=(axes, axes, axes),
            verbose=False,
        )
    assert program is not None
    return program.model_proto
