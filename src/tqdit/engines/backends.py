"""The backends, one row each: a package with the modules `build` and `run`. Adding one changes only this file.

The seam between a model and what compiles it is a callable: inputs by name in, the one output out.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from tqdit.card import GraphCard
from tqdit.engines.bundle import Manifest
from tqdit.errors import UsageError

BACKENDS = {"onnxruntime": "tqdit.engines.onnxruntime"}


class Engine(Protocol):
    """A compiled graph. Safe to call from several threads."""

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]: ...

    def close(self) -> None: ...


class BuildRow(Protocol):
    FLOAT_TYPES: tuple[str, ...]  # that the backend computes in here, the preferred one first

    def build(self, source: Path, card: GraphCard, folder: Path, precision: str, allow_fallback: bool) -> Manifest:
        """Compile `source` into files in `folder`, audit and describe them."""
        ...


class RunRow(Protocol):
    def load(self, folder: Path, manifest: Manifest, file: str, threads: int | None) -> Engine:
        """Open one compiled file of a bundle."""
        ...


def build_row(backend: str) -> BuildRow:
    return cast(BuildRow, _module(backend, "build"))


def run_row(backend: str) -> RunRow:
    return cast(RunRow, _module(backend, "run"))


def _module(backend: str, name: str) -> object:
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend '{backend}'; this tqdit has {', '.join(BACKENDS)}.")
    return importlib.import_module(f"{BACKENDS[backend]}.{name}")
