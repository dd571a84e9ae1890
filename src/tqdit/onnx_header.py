"""What an ONNX file says of itself beside its graph: producer and metadata, read without onnx.

A protobuf message is a sequence of fields, each a key (8 * number + wire type) and a value. The graph is skipped, so
the size of a file does not matter.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdit.card import METADATA_KEY, GraphCard
from tqdit.errors import FileFormatError
from tqdit.files import ONNX, reading

PRODUCER = "tqdit"
MAX_FIELDS, MAX_BYTES = 1_000_000, 100_000_000  # of a message, and of what is read of it
_PRODUCER_NAME, _GRAPH, _METADATA_PROPS, _KEY, _VALUE = 2, 7, 14, 1, 2  # numbers of fields in onnx.proto
_VARINT, _SIZED, _FIXED = 0, 2, {1: 8, 5: 4}  # wire types; the last are of 8 and 4 bytes


@dataclass(frozen=True)
class OnnxHeader:
    """A model without its graph."""

    path: Path
    producer: str
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> OnnxHeader:
        """Raises FileFormatError if `path` is missing, damaged or not an ONNX file."""
        if path.is_dir():
            raise FileFormatError(f"{path}: a folder, expected the ONNX file that tqdit-export wrote. Pass that file.")
        if not path.is_file():
            raise FileFormatError(f"{path}: no such file. Run tqdit-export {path.name} first.")
        producer, metadata, has_graph = "", {}, False
        with reading(path, ONNX, "Export it again.", ValueError), path.open("rb") as file:
            for number, value in _fields(file, (_PRODUCER_NAME, _METADATA_PROPS)):
                has_graph |= number == _GRAPH
                if number == _PRODUCER_NAME:
                    producer = value.decode()
                if number == _METADATA_PROPS:
                    entry = dict(_fields(io.BytesIO(value), (_KEY, _VALUE)))
                    metadata[entry.get(_KEY, b"").decode()] = entry.get(_VALUE, b"").decode()
        if not has_graph:
            raise FileFormatError(f"{path}: not an ONNX file, or one without a graph. Export it again.")
        return cls(path, producer, metadata)

    @property
    def card(self) -> GraphCard | None:
        """None if another program wrote the file. Raises FileFormatError if it is damaged."""
        if METADATA_KEY in self.metadata:
            return GraphCard.from_json(self.metadata[METADATA_KEY], str(self.path))
        if self.producer == PRODUCER:
            raise FileFormatError(
                f"{self.path}: damaged or truncated: tqdit-export wrote it with '{METADATA_KEY}' metadata, which is "
                "not there. Export it again."
            )
        return None


def _fields(file: BinaryIO, wanted: Collection[int]) -> Iterator[tuple[int, bytes]]:
    """(number, content) of each field of a message; only the `wanted` are read. ValueError if it is damaged."""
    end, count, left = file.seek(0, io.SEEK_END), 0, MAX_BYTES
    file.seek(0)
    while file.tell() < end:
        number, kind = divmod(_varint(file), 8)
        size = _varint(file) if kind in (_VARINT, _SIZED) else _FIXED.get(kind, end)
        size = 0 if kind == _VARINT else size
        count, left = count + 1, left - size * (number in wanted)
        if size > end - file.tell() or count > MAX_FIELDS or left < 0:
            raise ValueError(f"field {number} of type {kind} has {size} bytes, at {file.tell()} of {end}")
        if number in wanted:
            yield number, file.read(size)
        else:
            file.seek(size, io.SEEK_CUR)
            yield number, b""


def _varint(file: BinaryIO) -> int:
    """7 bits per byte, the lowest first; the highest bit of a byte says that another follows."""
    value = 0
    for shift in range(0, 64, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("it ends inside a field")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError("a number of more than 10 bytes")
