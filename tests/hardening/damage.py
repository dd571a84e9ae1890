"""Ways to damage a file (cuts at its structural boundaries, flipped bits), and how many failures the tests caused."""

import io
import json
import re
import struct
import zipfile
from collections import Counter

import numpy as np

CAUSED = Counter()  # kind of failure -> how many


def boundaries(name, data):
    """Offsets where one part of a file ends and the next begins."""
    suffix = name.rsplit(".", 1)[-1]
    readers = {"safetensors": _safetensors, "onnx": _protobuf, "npz": _zip, "pt": _pt, "json": _json}
    return sorted({0, *readers[suffix](data)})


def cuts(name, data, most=None):
    """Lengths to cut a file to: every boundary and the bytes beside it, or an even choice of `most` of them."""
    lengths = sorted({at + beside for at in boundaries(name, data) for beside in (-1, 0, 1)} & set(range(len(data))))
    if most is not None and len(lengths) > most:
        lengths = [lengths[int(index)] for index in np.linspace(0, len(lengths) - 1, most)]
    CAUSED["files cut short"] += len(lengths)
    return lengths


def flipped(data, rng, bits=1):
    """A copy with random bits flipped."""
    CAUSED["files with flipped bits"] += 1
    spoilt = bytearray(data)
    for bit in rng.choice(8 * len(data), bits, replace=False):
        spoilt[bit // 8] ^= 1 << (bit % 8)
    return bytes(spoilt)


def _safetensors(data):
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    tensors = [
        8 + length + at for key, entry in header.items() if key != "__metadata__" for at in entry["data_offsets"]
    ]
    return [8, 8 + length // 2, 8 + length, *tensors, len(data)]


def _zip(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        locals_ = [entry.header_offset for entry in archive.infolist()]
        return [*locals_, archive.start_dir, len(data) - 22, len(data)]


def _pt(data):
    return _zip(data) if data[:2] == b"PK" else [*range(0, len(data), max(1, len(data) // 40)), len(data)]


def _json(data):
    return [match.start() for match in re.finditer(rb'[\[\]{}:,"]', data)]


def _protobuf(data, start=0, end=None, depth=0):
    """Where the fields of a message begin and end; those of the graph and of its nodes as well."""
    end = len(data) if end is None else end
    at, found = start, []
    while at < end:
        found.append(at)
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            _, at = _varint(data, at)
        elif tag & 7 == 2:
            length, at = _varint(data, at)
            if depth < 2 and (depth == 1 or tag >> 3 == 7):  # ModelProto.graph is field 7
                found += _protobuf(data, at, at + length, depth + 1) if depth == 0 else [at]
            at += length
        else:
            at += 8 if tag & 7 == 1 else 4
    return [*found, end]


def _varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
