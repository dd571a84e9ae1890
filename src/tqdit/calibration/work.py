"""The work folder: what a killed calibration finds again.

Every file appears whole or not at all, so the files that exist say how far a run had come. A folder's name holds a
digest of all that its content depends on; other settings get another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tqdit.files import whole_file
from tqdit.quantization.table import ScaleTable, read_scale_table, write_scale_table
from tqdit.version import __version__

DOOMED = "search-removed"
_SEARCH = re.compile(rf"{DOOMED}|search-[0-9a-f]{{12}}")


def digest(facts: Any) -> str:
    """Twelve hexadecimal digits of anything that JSON can hold."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class WorkFolder:
    """Named results on disk: tensors and partial scale tables."""

    def __init__(self, path: Path, device: torch.device | None = None) -> None:
        self.path = path
        self.device = str(device or "cpu")  # that tensors are read to

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        return self._file(name).is_file()

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        with whole_file(self._file(name)) as temporary:
            try:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
            except SafetensorError as error:  # a full disk, told in its own way: 'I/O error: ... (os error 28)'
                number = re.search(r"\(os error (\d+)\)", str(error))
                if number is None:
                    raise
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error

    def load(self, name: str) -> dict[str, Tensor]:
        with safe_open(self._file(name), "pt", device=self.device) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)

    def keys(self, name: str, prefix: str) -> list[str]:
        """What follows `prefix` in the names of the tensors that begin with it."""
        with safe_open(self._file(name), "pt", device=self.device) as file:
            return [key.removeprefix(prefix) for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118

    def join(self, names: list[str], key: str) -> Tensor:
        """One tensor that lies in several files, in pieces along its first axis; nothing else is read."""
        pieces = []
        for name in names:
            with safe_open(self._file(name), "pt", device=self.device) as file:
                pieces.append(file.get_tensor(key))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def load_or_none(self, name: str) -> dict[str, Tensor] | None:
        """None if there is no such file, or one that something else than a kill has damaged."""
        try:
            return self.load(name) if self.has(name) else None
        except (SafetensorError, OSError):
            return None

    def save_table(self, name: str, table: ScaleTable) -> None:
        write_scale_table(self._file(name), table)

    def load_table(self, name: str) -> ScaleTable:
        return read_scale_table(self._file(name))

    def remove(self, name: str) -> None:
        self._file(name).unlink(missing_ok=True)

    def delete(self) -> None:
        _discard(self.path)


def _discard(folder: Path) -> None:
    """Remove a search at once: one that a kill left in part would be taken for one that can be continued."""
    doomed = folder.with_name(DOOMED)
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(OSError):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def open_search(root: Path, facts: Any, device: torch.device) -> WorkFolder:
    """The folder of one search, after removing what searches with other settings left in `root`."""
    name = f"search-{digest(facts)}"
    if root.is_dir():
        for other in root.iterdir():
            if _SEARCH.fullmatch(other.name) and other.name != name:
                _discard(other)
    return WorkFolder(root / name, device)


def versions(device: torch.device | None = None) -> dict[str, str]:
    """Of the libraries that decide the numbers, and the kind of device: results of two kinds are not mixed."""
    kind = {} if device is None or device.type == "cpu" else {"device": device.type}
    return {"tqdit": __version__, "torch": torch.__version__, "numpy": np.__version__} | kind
