"""The SHA-256 that a scale table carries of itself: a flipped bit in a step is still a step, and only this tells.

It lies in the table's JSON text and covers all the rest of it, and every tensor's name, type, shape and bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

SEAL = "sha256"


def seal(header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The header with the digest of itself and the tensors, instead of an earlier one."""
    content = {name: value for name, value in header.items() if name != SEAL}
    return content | {SEAL: _digest(content, tensors)}


def is_whole(header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the digest in the header is that of the rest."""
    return bool(header.get(SEAL) == seal(header, tensors)[SEAL])


def _digest(content: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of the JSON text without spaces, keys sorted, and of each tensor in the order of names: a line
    'NAME TYPE SHAPE' and its bytes, row-major and little-endian."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()
