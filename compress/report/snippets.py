"""How to run an artifact, in the words of the runtimes that its own files are for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.source.files import MAX_CONFIG_BYTES, read_json_object

GENAI, ORT, WEB_KEY = "genai_config.json", "model.ort", "transformers.js_config"
_NEW_LENGTH = 256

_GENAI = """\
import json
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
{prompt}
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length={length}, do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode(prompt))
stream = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
"""
_CHAT = """\
messages = [{"role": "user", "content": "Name three colours."}]
prompt = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)"""
_RAW = 'prompt = "The three colours are"'

_ENCODER = """\
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
encoded = tokenizer({call})
names = [item.name for item in session.get_inputs()]
answer = session.run(None, {{name: np.asarray(encoded[name], {dtype}) for name in names}})
for output, value in zip(session.get_outputs(), answer):
    print(output.name, value.shape)
"""

_WEB = """\
import {{ env, pipeline }} from "@huggingface/transformers";

env.localModelPath = "./models/"; // the folder in which this directory lies, here as "model"
env.allowRemoteModels = false;
const run = await pipeline("{task}", "model"{options});
console.log(await run({argument}));
"""
_OPTIMUM = """\
from optimum.onnxruntime import {name}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = {name}.from_pretrained(".")
encoded = tokenizer("The three colours are", return_tensors="pt")
{call}
"""
_OPTIMUM_CLASSES = {
    "text-generation": "ORTModelForCausalLM",
    "embedding": "ORTModelForFeatureExtraction",
    "text-classification": "ORTModelForSequenceClassification",
    "token-classification": "ORTModelForTokenClassification",
    "fill-mask": "ORTModelForMaskedLM",
}
_OPTIMUM_CALLS = {
    "text-generation": """\
inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32, do_sample=False)[0]))""",
}
#: The text that a task's example gives a pipeline.
_ARGUMENTS = {
    "text-generation": '[{ role: "user", content: "Name three colours." }], { max_new_tokens: 32 }',
    "feature-extraction": '"A text.", { pooling: "mean", normalize: true }',
    "fill-mask": '"The sky is [MASK]."',
    "question-answering": '"What is blue?", "The sky is blue."',
}


@dataclass(frozen=True)
class Snippet:
    """A way to run an artifact: what it is for, what must be installed, and the code with its language."""

    title: str
    needs: str
    language: str
    code: str


def snippets(directory: Path, record: Mapping[str, Any]) -> list[Snippet]:
    """Return what runs with the files that an artifact's directory has.

    Args:
        directory: The artifact.
        record: Its manifest.
    """
    task = str(record.get("task") or "text-generation")
    found = []
    if (directory / GENAI).is_file():
        found.append(_genai(directory))
    if task != "text-generation" and (directory / "model.onnx").is_file():
        found.append(_encoder(record))
    web = _web(directory, task)
    if web is not None:
        found.append(web)
    if "optimum" in (record.get("targets") or ()) and task in _OPTIMUM_CLASSES:
        code = _OPTIMUM.format(name=_OPTIMUM_CLASSES[task], call=_OPTIMUM_CALLS.get(task, "print(model(**encoded))"))
        found.append(Snippet("optimum", "pip install optimum-onnx[onnxruntime]", "python", code))
    if (directory / ORT).is_file():
        opened = f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{ORT}")\n'
        opened += "print([item.name for item in session.get_inputs()])\n"
        found.append(Snippet("ONNX Runtime Mobile's format", "pip install onnxruntime", "python", opened))
    if task == "text-generation":
        command = 'compress generate . "Name three colours."\n'
        found.append(Snippet("Try it with compress", "pip install compress-slm", "sh", command))
    return found


def _genai(directory: Path) -> Snippet:
    model = read_json_object(directory / GENAI, MAX_CONFIG_BYTES, GENAI).get("model")
    context = model.get("context_length") if isinstance(model, dict) else None
    length = min(_NEW_LENGTH, context) if isinstance(context, int) else _NEW_LENGTH
    code = _GENAI.format(prompt=_CHAT if has_chat_template(directory) else _RAW, length=length)
    if "json." not in code:
        code = code.removeprefix("import json\n")
    return Snippet("ONNX Runtime generate()", "pip install onnxruntime-genai", "python", code)


def has_chat_template(directory: Path) -> bool:
    """Return whether the tokenizer's files have a chat template."""
    if (directory / "chat_template.jinja").is_file():
        return True
    path = directory / "tokenizer_config.json"
    return path.is_file() and bool(read_json_object(path, MAX_CONFIG_BYTES, path.name).get("chat_template"))


def _encoder(record: Mapping[str, Any]) -> Snippet:
    profile = record.get("profile") or {}
    length = (profile.get("graph") or {}).get("static_length")
    text = '"What is blue?", "The sky is blue."' if record.get("task") == "question-answering" else '["A text."]'
    call = f'{text}, padding=True, truncation=True, return_token_type_ids=True, return_tensors="np"'
    if isinstance(length, int):  # the graph's shapes are fixed: one text, padded to its length
        call = f'{text}, padding="max_length", max_length={length}, truncation=True, return_token_type_ids=True, '
        call += 'return_tensors="np"'
    needs = "pip install onnxruntime transformers"
    return Snippet("ONNX Runtime", needs, "python", _ENCODER.format(call=call, dtype="np.int64"))


def _web(directory: Path, task: str) -> Snippet | None:
    """Return how transformers.js runs it, ``None`` where the directory was not made for it."""
    path = directory / "config.json"
    if not path.is_file() or not any(directory.glob("onnx/*.onnx")):
        return None
    own = read_json_object(path, MAX_CONFIG_BYTES, path.name).get(WEB_KEY)
    if not isinstance(own, dict):
        return None
    task = "feature-extraction" if task == "embedding" else task
    kind = own.get("dtype")
    options = f", {{ dtype: {json.dumps(kind)} }}" if isinstance(kind, str) else ""
    argument = _ARGUMENTS.get(task, '"A text."')
    if task == "text-generation" and not has_chat_template(directory):
        argument = '"The three colours are", { max_new_tokens: 32 }'
    code = _WEB.format(task=task, options=options, argument=argument)
    return Snippet("transformers.js, in a browser or Node", "npm install @huggingface/transformers", "js", code)
