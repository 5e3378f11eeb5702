"""A Hugging Face model directory: ``config.json`` and safetensors, single or sharded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from compress.contracts import FloatArray, TensorInfo
from compress.errors import SourceError, UsageError
from compress.source.base import CONFIG_NAME, BaseCheckpoint, OpenCheckpoint, load_config
from compress.source.files import MAX_INDEX_BYTES, contained, read_json_object
from compress.source.safetensors_file import ITEM_BYTES, SafetensorsFile, lookup

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_SHARDS = 4096
_QUANTIZED_SUFFIXES = ("weight", "qweight", "weight_packed", "qzeros", "weight_scale")

Weights = Literal["required", "optional", "ignore"]


class DirectoryCheckpoint(BaseCheckpoint):
    """A model directory on this machine.

    Args:
        directory: It holds ``config.json``.
        reference: What the user asked for.
        kind: ``directory``, or what led here (``hub``, ``package``).
        identifier: The name the manifest shows; the directory's name if not given.
        revision: The commit or version, if known.
        weights: ``optional`` accepts a directory that has none (``plan``); ``ignore`` does not look.

    Raises:
        SourceError: Missing, damaged, pickled or quantized weights; a bad config; an index that names what it may not.
    """

    def __init__(
        self,
        directory: Path,
        *,
        reference: str,
        kind: str = "directory",
        identifier: str | None = None,
        revision: str | None = None,
        weights: Weights = "required",
    ) -> None:
        _check_directory(directory, reference)
        super().__init__(
            reference=reference,
            kind=kind,
            identifier=identifier or directory.resolve().name,
            revision=revision,
            config=load_config(directory),
            directory=directory,
        )
        self._shards: dict[str, SafetensorsFile] = {}
        self._shard_of: dict[str, SafetensorsFile] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self._indexed = False
        if weights != "ignore":
            try:
                self._open_weights(required=weights == "required")
            except BaseException:
                self.close()
                raise
        self.has_weights = bool(self._shards)

    def _open_weights(self, *, required: bool) -> None:
        if (self.directory / WEIGHTS_NAME).exists() or (self.directory / WEIGHTS_NAME).is_symlink():
            self._add_shard(WEIGHTS_NAME, None)
            return
        if not (self.directory / INDEX_NAME).exists():
            _refuse_other_formats(self.directory, required=required)
            return
        self._indexed = True
        weight_map = _read_index(self.directory)
        for shard in sorted(set(weight_map.values())):
            self._add_shard(shard, INDEX_NAME)
        for name, shard in weight_map.items():
            if name not in self._shards[shard].tensors:
                raise SourceError(
                    f"the index says that tensor {name!r} is in {shard!r}, but it is not",
                    where=INDEX_NAME,
                    hint="index and shards are of different versions: download or copy the model again",
                )

    def _add_shard(self, name: str, named_by: str | None) -> None:
        shard = SafetensorsFile(contained(self.directory, name, named_by=named_by), name)
        self._shards[name] = shard
        for tensor, info in shard.tensors.items():
            if tensor in self._tensors:
                raise SourceError(
                    f"tensor {tensor!r} is in two shards", where=f"{self._shard_of[tensor].label} and {name}"
                )
            _refuse_integer_weight(info, name)
            self._tensors[tensor] = info
            self._shard_of[tensor] = shard

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every tensor's header by name."""
        return self._tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> FloatArray:
        """Return rows ``[start, stop)`` along axis 0 as a new C-contiguous float32 array.

        Raises:
            SourceError: Unknown tensor, rows outside it, not a float type, or a file shorter than its header says.
        """
        lookup(self._tensors, name, self.identifier)
        return self._shard_of[name].read(name, start, stop)

    def close(self) -> None:
        """Close the shards."""
        for shard in self._shards.values():
            shard.close()
        super().close()

    def _paths(self) -> Mapping[str, Path]:
        names = [CONFIG_NAME, *self._shards, *([INDEX_NAME] if self._indexed else [])]
        return {name: contained(self.directory, name) for name in names} | dict(self.sidecars())


def has_all_weights(directory: Path) -> bool:
    """Return whether ``directory`` holds its weights, every shard of them (a cached snapshot may hold a part)."""
    if (directory / WEIGHTS_NAME).exists():
        return True
    if not (directory / INDEX_NAME).exists():
        return False
    return all((directory / shard).exists() for shard in _read_index(directory).values())


def _read_index(directory: Path) -> dict[str, str]:
    index: dict[str, Any] = read_json_object(contained(directory, INDEX_NAME), MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError("the index has no weight_map", where=INDEX_NAME, hint="download or copy the model again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise SourceError(f"the index names no file for tensor {name!r}", where=INDEX_NAME)
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise SourceError(f"the index names more than {MAX_SHARDS} shards", where=INDEX_NAME)
    return weight_map


def _check_directory(directory: Path, reference: str) -> None:
    if not directory.exists():
        raise SourceError(
            "there is no such directory", where=reference, hint="check the path; `compress models` lists short names"
        )
    if not directory.is_dir():
        raise SourceError("this is a file, not a model directory", where=reference, hint="give the directory it is in")
    try:
        empty = next(directory.iterdir(), None) is None
    except OSError as error:
        raise SourceError(f"the directory cannot be read: {error.strerror or error}", where=reference) from error
    if empty:
        raise SourceError("the directory is empty", where=reference)


def _refuse_other_formats(directory: Path, *, required: bool) -> None:
    """Say what is there instead of safetensors; return only when nothing is and nothing has to be."""
    adapter = (directory / "adapter_config.json").exists()
    if adapter and not (directory / "pytorch_model.bin").exists():
        raise SourceError(
            "this is an adapter, not a model", where=directory.name, hint="give its base model, and this with --adapter"
        )
    pickled = sorted(path.name for pattern in PICKLED for path in directory.glob(pattern))
    pickled = [name for name in pickled if name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
    if pickled:
        raise SourceError(
            f"the weights are pickled only ({pickled[0]}); a pickle runs code when it is read, so it is refused",
            where=directory.name,
            hint="if you trust it, convert it once: AutoModelForCausalLM.from_pretrained(A).save_pretrained(B), then "
            "give B",
        )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        raise SourceError(
            f"there are safetensors files ({others[0]}), but neither {WEIGHTS_NAME} nor {INDEX_NAME}",
            where=directory.name,
            hint=f"copy the index too, or rename a single file to {WEIGHTS_NAME}",
        )
    foreign = sorted(
        path.name for pattern in ("*.gguf", "*.h5", "*.msgpack", "*.onnx") for path in directory.glob(pattern)
    )
    if foreign:
        hint = (
            f"give the file itself: {foreign[0]}" if foreign[0].endswith(".gguf") else "give a safetensors checkpoint"
        )
        raise SourceError(
            f"the directory has no safetensors weights, but {foreign[0]}", where=directory.name, hint=hint
        )
    if required:
        raise SourceError(
            "the directory has no weights",
            where=directory.name,
            hint=f"it must hold {WEIGHTS_NAME}, or {INDEX_NAME} and its shards",
        )


def _refuse_integer_weight(info: TensorInfo, where: str) -> None:
    """Integer buffers (position ids, causal masks) do no harm; an integer weight is a quantized one."""
    if info.dtype not in ITEM_BYTES and info.name.rsplit(".", 1)[-1] in _QUANTIZED_SUFFIXES:
        raise SourceError(
            f"the checkpoint is already quantized: tensor {info.name!r} is stored as {info.dtype}",
            where=where,
            hint="start from the float16, bfloat16 or float32 checkpoint it was made from",
        )


class LocalDirectory:
    """The source kind ``directory``."""

    name = "directory"
    describes = "a model directory"
    priority = 30

    def matches(self, reference: str) -> bool:
        """Return whether the reference is an existing path, or is written as one."""
        written = reference.startswith(("/", "./", "../", "~")) or reference in (".", "..")
        return written or Path(reference).exists()

    def open(
        self, reference: str, *, revision: str | None, cache_dir: Path | None, config_only: bool
    ) -> OpenCheckpoint:
        """Open the directory; weights may be missing with ``config_only``."""
        if revision is not None:
            raise UsageError("a directory has no revisions", where=reference, hint="leave the revision out")
        return DirectoryCheckpoint(
            Path(reference).expanduser(), reference=reference, weights="optional" if config_only else "required"
        )


SOURCE = LocalDirectory()
