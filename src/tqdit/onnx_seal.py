"""The SHA-256 that an exported ONNX file carries of itself and of the weights beside it (docs/onnx-file.md).

A flipped bit in a weight makes another valid file, and only this tells. The entry comes first in the metadata, so that
no cut leaves a card without it.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx

from tqdit.card import METADATA_KEY
from tqdit.engines.config import Progress, silent
from tqdit.errors import FileFormatError

KEY = "tqdit_sha256"
UNSEALED = "0" * 64  # the value while a file is written, and in what a backend made of a sealed one
CHUNK_BYTES = 1 << 25
# The entry as protobuf writes it: tag and length of a metadata entry; of its key; of its value, which follows.
_ENTRY = b"\x72\x50" + b"\x0a\x0c" + KEY.encode() + b"\x12\x40"
_CARD = b"\x0a\x05" + METADATA_KEY.encode() + b"\x12"


def add_entry(model: onnx.ModelProto) -> None:
    """Give a model that is about to be saved the place for its seal."""
    entries = [entry for entry in model.metadata_props if entry.key != KEY]
    del model.metadata_props[:]
    model.metadata_props.add(key=KEY, value=UNSEALED)
    model.metadata_props.extend(entries)


def seal(path: Path, beside: Mapping[str, str]) -> None:
    """Write the digest into its place. `beside`: name -> SHA-256 of each file with external data."""
    at = _find(path, _ENTRY + UNSEALED.encode())
    assert at is not None, "a file without a place for its seal"
    _overwrite(path, at, _digest(path, at, beside))


def unseal(path: Path) -> None:
    """Take the digest out of a file that a backend made of a sealed one: ONNX Runtime keeps the metadata as it was."""
    at = _find(path, _ENTRY)
    if at is not None:
        _overwrite(path, at, UNSEALED)


def check_seal(path: Path, model: onnx.ModelProto, beside: set[str], progress: Progress = silent) -> bool:
    """Refuse a file, `model` without its external data, that is not as it was exported; whether it has a seal at all.

    Who edits a graph removes the entry. Flipped bits must not do that unnoticed, so what is left of one counts.
    """
    value = next((entry.value for entry in model.metadata_props if entry.key == KEY), None)
    if value == UNSEALED or (value is None and not _is_spoilt(path)):
        return False
    tick = _Tick(progress, [path, *(path.parent / name for name in beside)])
    at = None if value is None else _find(path, _ENTRY + value.encode())
    digests = {name: _sha256(path.parent / name, tick) for name in sorted(beside)} if at is not None else {}
    if at is None or _digest(path, at, digests, tick) != value:
        raise FileFormatError(
            f"{path}: altered since tqdit-export wrote it (its SHA-256 differs). Export it again or, if the change is "
            f"meant, remove the entry '{KEY}' from its metadata."
        )
    return True


class _Tick:
    """Progress in MB, for files that take longer than a moment."""

    def __init__(self, progress: Progress, files: list[Path]) -> None:
        self.progress, self.done, self.total = progress, 0, sum(file.stat().st_size for file in files)

    def __call__(self, size: int) -> None:
        self.done += size
        if self.total > CHUNK_BYTES:
            self.progress("checking the file (MB)", self.done >> 20, self.total >> 20)


def _digest(path: Path, at: int, beside: Mapping[str, str], tick: _Tick | None = None) -> str:
    """Of the file with zeros as its digest, and of a line 'NAME SIZE SHA-256' for each file beside, ordered by name."""
    digest, start = hashlib.sha256(), 0
    for chunk in _chunks(path, tick):
        first, last = (min(max(edge - start, 0), len(chunk)) for edge in (at, at + len(UNSEALED)))
        digest.update(chunk[:first] + b"0" * (last - first) + chunk[last:] if first < last else chunk)
        start += len(chunk)
    for name, sha256 in sorted(beside.items()):
        digest.update(f"{name} {(path.parent / name).stat().st_size} {sha256}\n".encode())
    return digest.hexdigest()


def _sha256(path: Path, tick: _Tick) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(path, tick):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(path: Path, tick: _Tick | None) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
            if tick is not None:
                tick(len(chunk))


def _find(path: Path, entry: bytes) -> int | None:
    """Where the value of an entry begins. Searched from the end, before which the weights lie."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.rfind(entry)
    return None if at < 0 else at + len(_ENTRY)


def _is_spoilt(path: Path) -> bool:
    """Whether most of an entry lies before that of the card, in a file whose metadata has none."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        card = data.rfind(_CARD)
        before = data[max(0, card - len(_ENTRY) - len(UNSEALED) - 6) : max(0, card)]
    places = range(max(0, len(before) - len(UNSEALED) - len(_ENTRY)))  # the card's own length takes 1 to 5 bytes
    agreeing = (sum(map(int.__eq__, before[at : at + len(_ENTRY)], _ENTRY)) for at in places)
    return max(agreeing, default=0) > len(_ENTRY) // 2


def _overwrite(path: Path, at: int, value: str) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(value.encode())
