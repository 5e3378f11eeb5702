"""Uploads an artifact to the Hugging Face hub as one commit: what its manifest lists, its signature, nothing else.

Requires an artifact whose digests match; ensures that the repository then has every file at its size. Needs a token
with write permission. Stale files of earlier commits are left where they are.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, UsageError
from compress.package import manifest
from compress.package.tree import sha256
from compress.package.verify import verify
from compress.source.hub import HUB_ID

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

#: The hub keeps these in large file storage, as .gitattributes of a new repository says, ...
_LARGE_PATTERNS = ("*.onnx", "*.bin", "*.ort", "*.safetensors", "*.gguf", "*.npz", "*.npy", "*.tflite", "*tfevents*")
#: ... and so it does what is larger than this many bytes, and what is not text.
_LARGE_FROM = 10_000_000
_SAMPLE = 512
#: The HTTP client's errors of the connection, by name: which client it is changes with huggingface_hub.
_CONNECTION = {"ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "WriteError", "RemoteProtocolError"}


@dataclass(frozen=True)
class Upload:
    """A file to send; ``large`` says whether the hub is expected to keep it in large file storage (LFS)."""

    name: str
    size: int
    sha256: str
    large: bool


def verified(directory: Path) -> dict[str, Any]:
    """Return the manifest of an artifact that is what it says; files that it does not list stay here, and may be there.

    Raises:
        CompressError: There is no manifest, or something is missing, changed, a link, or leads outside.
    """
    record = manifest.read_manifest(directory)
    problems = [problem for problem in verify(directory).problems if problem.kind != "extra"]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CompressError(
            f"the artifact is not what its manifest says: {problems[0].file}: {problems[0].message}{more}",
            where=str(directory),
            hint="compress verify says all; export again, or compress validate where the change is meant",
        )
    # `compress validate` lists what it finds: what an editor or a shell left there must not be published with it.
    hidden = next((item["name"] for item in record["files"] if f"/{item['name']}".count("/.")), None)
    if hidden is not None:
        raise CompressError(
            f"the manifest lists a hidden file, {hidden}, which no export makes",
            where=str(directory),
            hint="remove it, and renew the manifest with compress validate",
        )
    return record


def planned(directory: Path, *, allow_rejected: bool) -> list[Upload]:
    """Return what a push sends: the manifest's files, a signature where there is one, the manifest.

    Raises:
        CompressError: The artifact does not match its manifest.
        UsageError: It was not accepted, and ``allow_rejected`` does not say that this is fine.
    """
    record = verified(directory)
    status = record["status"]
    if status != "accepted" and not allow_rejected:
        why = "it is outside its profile's budget" if status == "rejected" else "nothing was measured on it"
        raise UsageError(
            f"the artifact's status is {status}: {why}",
            where=str(directory),
            hint="compress validate measures it; --allow-rejected pushes it all the same",
        )
    names = [(item["name"], item["sha256"]) for item in record["files"]]
    beside = [name for name in (manifest.SIGNATURE_NAME, manifest.NAME) if (directory / name).is_file()]
    names += [(name, sha256(directory / name)) for name in beside]
    return [Upload(name, (directory / name).stat().st_size, sha256, _large(directory / name)) for name, sha256 in names]


def _large(path: Path) -> bool:
    size = path.stat().st_size
    if size > _LARGE_FROM or any(fnmatch.fnmatch(path.name, pattern) for pattern in _LARGE_PATTERNS):
        return True
    with path.open("rb") as stream:
        return size > 0 and b"\0" in stream.read(_SAMPLE)


def left_out(directory: Path, uploads: Sequence[Upload]) -> list[str]:
    """Return the files of the directory that are not sent, because the manifest does not list them."""
    sent = {item.name for item in uploads}
    found = (path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if not path.is_dir())
    return [name for name in found if name not in sent]


def push(
    directory: Path,
    repo_id: str,
    uploads: Sequence[Upload],
    *,
    private: bool,
    revision: str | None,
    message: str,
    say: Callable[[str], None],
) -> str:
    """Create the repository and the branch where they are missing, commit the files, and return the commit's address.

    Args:
        directory: The artifact.
        repo_id: ``owner/name``.
        uploads: What :func:`planned` returned.
        private: The repository must be private; one that exists and is public is refused.
        revision: The branch; ``None`` for ``main``.
        message: The commit's first line.
        say: Called with what is being done.

    Raises:
        CompressError: No token, no network, offline, no permission, or the hub has not what was sent.
    """
    api = _api()
    try:
        say(f"creating {repo_id}, unless it is there")
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise CompressError(
                "the repository exists already, and everybody can read it",
                where=repo_id,
                hint="make it private on the hub first, choose another one, or leave --private out",
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        say(f"sending {len(uploads)} files, {sum(item.size for item in uploads) / 1e6:,.1f} MB")
        commit = api.create_commit(repo_id, _operations(directory, uploads), commit_message=message, revision=revision)
        _check_arrived(api, repo_id, commit.oid, uploads)
    except CompressError:
        raise
    except Exception as error:  # the library's and its HTTP client's errors have no common base
        raise _explain(error, repo_id) from error
    return str(commit.commit_url)


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no ``owner/name``.

    Raises:
        UsageError: With how one is written.
    """
    if HUB_ID.fullmatch(repo_id) is None:
        raise UsageError(f"{repo_id!r} is no repository of the hub", hint="owner/name, of letters, digits, - _ and .")


def _api() -> HfApi:
    """Return the hub's client.

    Raises:
        CompressError: Offline, or nobody is logged in.
    """
    import huggingface_hub

    if huggingface_hub.constants.is_offline_mode():
        raise CompressError("HF_HUB_OFFLINE is set: nothing is sent", hint="unset it, or look with --dry-run")
    token = huggingface_hub.get_token()
    if token is None:
        raise CompressError(
            "there is no token for the hub", hint="`hf auth login`, or set HF_TOKEN to one that may write"
        )
    return huggingface_hub.HfApi(token=token, library_name="compress")


def _operations(directory: Path, uploads: Sequence[Upload]) -> list[CommitOperationAdd]:
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(path_in_repo=item.name, path_or_fileobj=str(directory / item.name)) for item in uploads]


def _check_arrived(api: HfApi, repo_id: str, commit: str, uploads: Sequence[Upload]) -> None:
    """Refuse a commit that lacks something: a .gitignore of the repository leaves files out without a word."""
    there = {
        item.path: item
        for item in api.get_paths_info(repo_id, [item.name for item in uploads], revision=commit)
        if hasattr(item, "size")
    }
    for item in uploads:
        found = there.get(item.name)
        stored = getattr(getattr(found, "lfs", None), "sha256", None)
        if found is None or found.size != item.size or stored not in (None, item.sha256):
            raise CompressError(
                f"the hub's commit has no such {item.name} as was sent",
                where=f"{repo_id} at {commit}",
                hint="look for a .gitignore in the repository, and push again",
            )


def _explain(raised: Exception, repo_id: str) -> CompressError:
    from huggingface_hub import errors

    # An upload's error comes wrapped into one that only names the file.
    error = next((one for one in _chain(raised) if getattr(one, "response", None) is not None), raised)
    status = getattr(getattr(error, "response", None), "status_code", None)
    first = (str(getattr(error, "server_message", None) or error).strip() or type(error).__name__).splitlines()[0][:200]
    if isinstance(error, errors.RevisionNotFoundError):
        return CompressError(f"the repository has no such revision: {first}", where=repo_id)
    if status == 401:
        return CompressError(
            "the hub does not accept the token", where=repo_id, hint="`hf auth login` with a token that may write"
        )
    if status == 403:
        return CompressError(
            f"no permission to write there: {first}",
            where=repo_id,
            hint="use a token with write permission for this owner, or another owner's name",
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return CompressError(
            "the hub has no such repository or owner, or it is hidden from this token",
            where=repo_id,
            hint="check the spelling, and what the token may do",
        )
    if status in (409, 412):
        return CompressError(
            f"somebody else changed the repository meanwhile, or the name is taken: {first}",
            where=repo_id,
            hint="push again, or choose another name",
        )
    if status is not None:
        return CompressError(f"the hub answered {status}: {first}", where=repo_id, hint="try again later")
    if any(type(one).__name__ in _CONNECTION or isinstance(one, ConnectionError) for one in _chain(raised)):
        return CompressError(f"the hub cannot be reached: {first}", where=repo_id, hint="check the connection")
    return CompressError(f"the push failed: {first}", where=repo_id, hint="try again; what the hub has, it keeps")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
