"""safetensors files with NumPy alone, so that a machine without the library can inspect a scale table.

The format: 8 bytes n (little-endian), n bytes of JSON, then the bytes of the tensors without gaps. The JSON maps each
name to a type, a shape and a place; `__metadata__` maps names to texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

MAX_HEADER = 100_000_000  # bytes, as in the format's own library
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
         "BOOL": "?"}  # fmt: skip
Size = Annotated[int, msgspec.Meta(ge=0)]
Shapes = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]  # type and shape of each tensor, in their order


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[Size]
    data_offsets: tuple[Size, Size]  # in the bytes after the header


def read_metadata(path: Path) -> dict[str, str]:
    """The texts of a header; nothing else is read. Raises OSError, or ValueError that says what is wrong."""
    return _read_header(path)[0]


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Of each tensor, from the header alone. Raises OSError, or ValueError that says what is wrong."""
    return {name: entry.shape for name, entry in _read_header(path)[1].items()}


def read(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """(texts, arrays by name). Raises OSError, or ValueError that says what is wrong."""
    metadata, entries, start = _read_header(path)
    data = memoryview(path.read_bytes())[start:]
    arrays: dict[str, NDArray[Any]] = {}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if entry.dtype not in TYPES:
            raise ValueError(f"'{name}' has type {entry.dtype}, expected one of {', '.join(TYPES)}")
        dtype = np.dtype(TYPES[entry.dtype])
        if begin != at or end - begin != math.prod(entry.shape) * dtype.itemsize or end > len(data):
            raise ValueError(f"'{name}', {entry.dtype} {entry.shape}, has bytes {begin} to {end} of {len(data)}")
        arrays[name] = np.frombuffer(data[begin:end], dtype).reshape(entry.shape).copy()
        at = end
    if at != len(data):
        raise ValueError(f"{len(data)} bytes of tensors, expected {at}")
    return metadata, arrays


def header(metadata: Mapping[str, str], shapes: Shapes) -> bytes:
    """What a file begins with; the bytes of the tensors follow in their order, little-endian and without gaps."""
    codes = {np.dtype(code): name for name, code in TYPES.items()}
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape) in shapes.items():
        end = at + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, _Entry], int]:
    """(texts, tensors, where their bytes begin)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER, path.stat().st_size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {path.stat().st_size}")
        text = file.read(length)
    try:
        header = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(header.pop("__metadata__", b"{}"), type=dict[str, str])
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in header.items()}
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise ValueError(f"a header that is not one of safetensors: {error}") from error
    return metadata, entries, 8 + length
