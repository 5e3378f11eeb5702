"""A note in a graph file's metadata, added where there is no ONNX library: a protobuf message can be appended to.

``ModelProto.metadata_props`` is field 14, a repeated message of key (field 1) and value (field 2). Fields of a message
may come in any order, and serialized messages that are concatenated merge: what is appended is one more entry.
"""

from __future__ import annotations

from pathlib import Path

_METADATA_PROPS, _KEY, _VALUE, _LENGTH_DELIMITED = 14, 1, 2, 2


def add_metadata(model: Path, key: str, value: str) -> None:
    """Append an entry to a graph's metadata."""
    entry = _field(_KEY, key.encode()) + _field(_VALUE, value.encode())
    with model.open("ab") as stream:
        stream.write(_field(_METADATA_PROPS, entry))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
