"""Arrays and a JSON document in one file, replaced whole: what long work keeps of itself, to go on after a kill.

numpy's ``.npz``, the document in it as UTF-8 bytes; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_DOCUMENT = "document"


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]], document: Any) -> None:
    """Write beside, flush to the disk, rename.

    Args:
        path: The file.
        arrays: By names other than ``document``.
        document: What JSON can say; floats come back with every bit.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("wb") as stream:
            text = np.frombuffer(json.dumps(document).encode(), np.uint8)
            np.savez(stream, **{**arrays, _DOCUMENT: text})  # type: ignore[arg-type]
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_arrays(path: Path) -> tuple[dict[str, npt.NDArray[Any]], Any]:
    """Return the arrays by name, and the document.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return arrays, json.loads(arrays.pop(_DOCUMENT).tobytes())
    except (KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"damaged: {error}") from error
