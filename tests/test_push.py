"""Pushing to the hub: a local server that answers as the hub does for repositories, large files and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from compress.cli import run
from compress.errors import CompressError
from compress.package import manifest
from compress.package.manifest import SIGNATURE_NAME
from compress.push import planned, verified
from compress.report import json as report_json
from compress.report.environment import environment
from compress.report.model import Report, Size, Verdict

Capture = pytest.CaptureFixture[str]
# How huggingface_hub hands a file to its HTTP client, which would like another word for it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Hub(ThreadingHTTPServer):
    """What the server knows: repositories with their files, and how it shall misbehave."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refuse: dict[str, tuple[int, str]] = {}
        self.ignored: set[str] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Be silent."""

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:
        self.server.requests.append(f"PUT {self.path}")
        self.server.stored[self.path.removeprefix("/store/")] = self._body()
        self._send(200, {})

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        for part, (code, message) in self.server.refuse.items():
            if part in path:
                return self._send(code, {"error": message})
        if self.headers.get("Authorization") != "Bearer hf_write":
            return self._send(401, {"error": "Invalid credentials"})
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._send(200, {"warnings": [], "errors": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        repo = self.server.repositories.get("/".join(parts[2:4]))
        if repo is None:
            return self._send(404, {"error": "Repository not found"})
        if len(parts) == 4:
            return self._send(200, {"id": "/".join(parts[2:4]), "private": repo["private"], "siblings": []})
        if parts[4] == "branch":
            repo["branches"].add(parts[5])
            return self._send(200, {})
        if parts[4] == "preupload":
            return self._preupload(json.loads(body))
        if parts[4] == "commit":
            return self._commit("/".join(parts[2:4]), repo, parts[5], body)
        return self._paths(repo, body)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in self.server.repositories:
            return self._send(
                409, {"error": "You already created this model repo", "url": f"{self.server.address}/{name}"}
            )
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.server.repositories[name] = {"private": private, "branches": {"main"}, "files": {}, "messages": []}
        return self._send(200, {"url": f"{self.server.address}/{name}"})

    def _preupload(self, asked: dict[str, Any]) -> None:
        files = [
            {
                "path": item["path"],
                "uploadMode": "lfs" if item["path"].endswith((".onnx", ".data")) else "regular",
                "shouldIgnore": item["path"] in self.server.ignored,
            }
            for item in asked["files"]
        ]
        self._send(200, {"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.server.address}/store/{item['oid']}", "header": {}}}}
            for item in asked["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repo: dict[str, Any], branch: str, body: bytes) -> None:
        assert branch in repo["branches"]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repo["messages"].append(value["summary"])
            elif entry["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            else:
                repo["files"][value["path"]] = self.server.stored[value["oid"]]
                repo.setdefault("large", set()).add(value["path"])
        self._send(200, {"commitUrl": f"{self.server.address}/{name}/commit/c0ffee", "commitOid": "c0ffee"})

    def _paths(self, repo: dict[str, Any], body: bytes) -> None:
        found = []
        for name in parse_qs(body.decode())["paths"]:
            if name in repo["files"]:
                content = repo["files"][name]
                item: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": "x"}
                if name in repo.get("large", ()):
                    item["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
                found.append(item)
        self._send(200, found)

    def _send(self, code: int, document: Any) -> None:
        content = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub
    from huggingface_hub import constants

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_write")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def judged(place: Path, verdict: str) -> None:
    """Give an artifact a report, and the status that goes with its verdict."""
    report = Report(
        verdict=Verdict(status=verdict, reasons=() if verdict == "pass" else ("kl is 9",)),  # type: ignore[arg-type]
        size=Size(artifact_bytes=1),
        environment=environment(),
    )
    report_json.write(report, place / "report.json")
    status = "accepted" if verdict == "pass" else "rejected"
    manifest.write_manifest(place, manifest.read_manifest(place), status=status)


@pytest.fixture
def artifact(tiny_artifact: Callable[..., Path], tmp_path: Path) -> Path:
    place = tmp_path / "tiny"
    shutil.copytree(tiny_artifact("llama", "arm-int4"), place)
    judged(place, "pass")
    (place / ".env").write_text("HF_TOKEN=hf_secret")  # not an artifact's file: never sent
    return place


def refused(capsys: Capture, *words: str, code: int = 1) -> str:
    capsys.readouterr()
    assert run(["push", *words]) == code
    err = capsys.readouterr().err
    return err[err.index("error: ") :]


def test_creates_and_commits(hub: Hub, artifact: Path, capsys: Capture) -> None:
    assert run(["push", str(artifact), "me/tiny", "--private", "--message", "first"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{hub.address}/me/tiny/commit/c0ffee\n" and "creating me/tiny" in err
    repo = hub.repositories["me/tiny"]
    assert repo["private"] and repo["messages"] == ["first"]
    expected = {item["name"] for item in manifest.read_manifest(artifact)["files"]} | {"manifest.json"}
    assert set(repo["files"]) == expected and ".env" not in repo["files"]
    assert all(content == (artifact / name).read_bytes() for name, content in repo["files"].items())
    assert repo["large"] == {"model.onnx", "model.onnx.data"}


def test_again_and_on_a_branch(hub: Hub, artifact: Path, capsys: Capture) -> None:
    assert run(["push", str(artifact), "me/tiny"]) == 0
    assert run(["push", str(artifact), "me/tiny", "--revision", "v2"]) == 0
    repo = hub.repositories["me/tiny"]
    assert repo["branches"] == {"main", "v2"} and repo["messages"] == ["compress: tiny"] * 2
    assert "everybody can read it" in refused(capsys, str(artifact), "me/tiny", "--private")
    assert len(repo["messages"]) == 2


def test_a_file_that_the_repository_ignores_is_missed(hub: Hub, artifact: Path, capsys: Capture) -> None:
    hub.ignored.add("tokenizer.json")
    assert "no such tokenizer.json as was sent" in refused(capsys, str(artifact), "me/tiny")


@pytest.mark.parametrize(
    ("part", "answer", "message"),
    [
        ("create", (401, "Invalid"), "does not accept the token"),
        ("create", (403, "You don't have the rights"), "no permission to write there: "),
        ("commit", (412, "A commit has happened since"), "somebody else changed the repository meanwhile"),
        ("commit", (404, "Repository not found"), "no such repository or owner"),
        ("commit", (400, "Your storage is full"), "the hub answered 400: "),
    ],
)
def test_refusals(part: str, answer: tuple[int, str], message: str, hub: Hub, artifact: Path, capsys: Capture) -> None:
    hub.refuse[part] = answer
    said = refused(capsys, str(artifact), "me/tiny")
    assert message in said and 2 <= len(said.strip().splitlines()) <= 3


def test_without_a_connection(hub: Hub, artifact: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "the hub cannot be reached" in refused(capsys, str(artifact), "me/tiny")


def test_offline_and_without_a_token(
    hub: Hub, artifact: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "there is no token for the hub" in refused(capsys, str(artifact), "me/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(capsys, str(artifact), "me/tiny")
    assert hub.requests == []


def test_dry_run_asks_nobody(artifact: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.push._api", lambda: pytest.fail("a dry run needs no client"))
    assert run(["push", str(artifact), "me/tiny", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = [*manifest.read_manifest(artifact)["files"], "manifest.json"]
    assert [line.split()[2:] for line in lines if "onnx" in line] == [["LFS", "model.onnx"], ["LFS", "model.onnx.data"]]
    assert any(line.split() == ["stays", "here", ".env"] for line in lines)
    assert lines[-1].startswith(f"{len(expected)} files, ") and lines[-1].endswith("to me/tiny")


@pytest.mark.parametrize("status", ["rejected", "built"])
def test_only_what_was_accepted(status: str, artifact: Path, capsys: Capture) -> None:
    (artifact / ".env").unlink()
    if status == "rejected":
        judged(artifact, "fail")
    else:
        (artifact / "report.json").unlink()
        manifest.write_manifest(artifact, manifest.read_manifest(artifact), status="built")
    message = refused(capsys, str(artifact), "me/tiny", "--dry-run", code=2)
    assert f"status is {status}" in message and "--allow-rejected" in message
    assert run(["push", str(artifact), "me/tiny", "--dry-run", "--allow-rejected"]) == 0
    assert "is no repository of the hub" in refused(capsys, str(artifact), "tiny", "--dry-run", code=2)


def test_a_hidden_file_is_not_published(artifact: Path) -> None:
    (artifact / "sbom.cdx.json").unlink()
    judged(artifact, "pass")  # lists what it finds, as a second validation does
    with pytest.raises(CompressError, match="lists a hidden file, .env"):
        verified(artifact)


def test_a_signature_goes_with_it(artifact: Path) -> None:
    assert SIGNATURE_NAME not in {item.name for item in planned(artifact, allow_rejected=False)}
    (artifact / SIGNATURE_NAME).write_text("{}")
    assert [item.name for item in planned(artifact, allow_rejected=False)][-2:] == [SIGNATURE_NAME, "manifest.json"]


def test_what_does_not_match_its_manifest(artifact: Path, tmp_path: Path) -> None:
    assert verified(artifact)["status"] == "accepted"
    data = artifact / "model.onnx.data"
    whole = data.read_bytes()
    changed = bytearray(whole)
    changed[1000] ^= 1
    data.write_bytes(changed)
    with pytest.raises(CompressError, match="the bytes were changed"):
        verified(artifact)
    (tmp_path / "elsewhere").write_bytes(whole)
    data.unlink()
    with pytest.raises(CompressError, match="not there"):
        verified(artifact)
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CompressError, match="a symbolic link"):
        verified(artifact)


def test_a_name_that_leads_outside(artifact: Path) -> None:
    record = manifest.read_manifest(artifact)
    record["files"][0]["name"] = "../elsewhere"
    (artifact / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(CompressError, match="is refused"):
        verified(artifact)
