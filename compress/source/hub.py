"""A model of the Hugging Face hub, ``owner/name``: only the files that are needed, at a resolved commit."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from compress.errors import CompressError, ResourceError, SourceError
from compress.source.base import CONFIG_NAME, SIDECAR_NAMES, OpenCheckpoint
from compress.source.local_directory import INDEX_NAME, WEIGHTS_NAME, DirectoryCheckpoint, has_all_weights
from compress.source.sentence_transformers import SENTENCE_NAMES

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# How a sentence's vector is made is part of what a plan is made from.
CONFIG_PATTERNS = [CONFIG_NAME, *SENTENCE_NAMES]
# The model card names the licence.
# Never *.bin (pickled), *.onnx, *.gguf, or another copy of the weights (`original/`, `consolidated.safetensors`).
ALL_PATTERNS = [CONFIG_NAME, "README.md", *SIDECAR_NAMES, WEIGHTS_NAME, INDEX_NAME, "model-*-of-*.safetensors"]
# In these patterns `*` also stands for a `/`.
IGNORED_PATTERNS = ["model-*/*"]


def fetch(hub_id: str, *, revision: str | None, cache_dir: Path | None, config_only: bool) -> Path:
    """Download what is missing of a model and return its snapshot directory, named after the commit.

    An interrupted download resumes. With ``HF_HUB_OFFLINE=1`` only the cache is looked at.

    Raises:
        SourceError: No such model or revision, no permission, no connection, or not in the cache when offline.
        ResourceError: The disk is full.
    """
    # The reference asks for this model, and for nothing else to be sent.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub

    try:
        snapshot = huggingface_hub.snapshot_download(
            hub_id,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=CONFIG_PATTERNS if config_only else ALL_PATTERNS,
            ignore_patterns=IGNORED_PATTERNS,
        )
    except Exception as error:  # the library's and its HTTP client's errors have no common base
        raise _explain(error, hub_id, revision) from error
    return Path(snapshot)


def _explain(error: Exception, hub_id: str, revision: str | None) -> CompressError:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return SourceError(
            "the model is gated: its owner grants access",
            where=hub_id,
            hint=f"accept its terms at https://huggingface.co/{hub_id}, then `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(f"the model has no revision {revision!r}", where=hub_id, hint="give a branch, tag or commit")
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceError(
            "the hub has no such model, or it is private; nor is there such a directory here",
            where=hub_id,
            hint="check the spelling; for a private model, `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ResourceError("the disk is full", where=hub_id, hint="free some space, or set HF_HOME to another disk")
    offline = constants.HF_HUB_OFFLINE or isinstance(error, errors.OfflineModeIsEnabled)
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        partly = isinstance(error, errors.IncompleteSnapshotError)
        state = "only partly in the cache" if partly else "not in the cache"
        hint = f"unset HF_HUB_OFFLINE, or fetch it first where there is a network: hf download {hub_id}"
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        return SourceError(
            f"the model is {state}, and {why}",
            where=hub_id,
            hint=hint if offline else "check the connection and try again",
        )
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return SourceError(
        f"the model cannot be fetched: {first}", where=hub_id, hint="try again; what was downloaded is kept"
    )


class Hub:
    """The source kind ``hub``."""

    name = "hub"
    describes = "a hub id owner/name"
    priority = 40

    def matches(self, reference: str) -> bool:
        """Return whether the reference is written as ``owner/name``."""
        return HUB_ID.fullmatch(reference) is not None

    def open(
        self, reference: str, *, revision: str | None, cache_dir: Path | None, config_only: bool
    ) -> OpenCheckpoint:
        """Fetch and open the model; with ``config_only`` its weights are used only if the cache has all of them."""
        directory = fetch(reference, revision=revision, cache_dir=cache_dir, config_only=config_only)
        try:
            return DirectoryCheckpoint(
                directory,
                reference=reference,
                kind=self.name,
                identifier=reference,
                revision=directory.name,
                weights="required" if not config_only or has_all_weights(directory) else "ignore",
            )
        except SourceError as error:
            if "no weights" in error.what:
                raise SourceError(
                    "the model has no safetensors weights; pickled ones are not fetched",
                    where=reference,
                    hint="look for a revision that has them (often refs/pr/N), or convert the model once",
                ) from error
            raise


SOURCE = Hub()
