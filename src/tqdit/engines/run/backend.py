"""What runs a compiled graph: the module `run` of each backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from tqdit.engines.backends import load_side
from tqdit.engines.bundle import Manifest


class Engine(Protocol):
    """A compiled graph: inputs by name in, its one output out. Safe to call from several threads."""

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]: ...

    def close(self) -> None: ...


class Runner(Protocol):
    """The module `run` of a backend."""

    def load(self, folder: Path, manifest: Manifest, file: str, threads: int | None) -> Engine:
        """Open one compiled file of a bundle."""
        ...


class InParts:
    """An engine whose graph takes a fixed number of rows, called with any multiple of it."""

    def __init__(self, engine: Engine, rows: int) -> None:
        self._engine, self._rows = engine, rows

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        count = len(next(iter(inputs.values())))
        parts = [slice(start, start + self._rows) for start in range(0, count, self._rows)]
        made = [self._engine({name: array[part] for name, array in inputs.items()}).copy() for part in parts]
        return np.concatenate(made)

    def close(self) -> None:
        self._engine.close()


def open_engine(folder: Path, manifest: Manifest, threads: int | None = None) -> Engine:
    """The network of a bundle, for any number of rows that it was built for."""
    engine = runner(manifest.backend).load(folder, manifest, manifest.entry, threads)
    return engine if manifest.card.rows is None else InParts(engine, manifest.card.rows)


def runner(backend: str) -> Runner:
    """The run side of a backend. Raises UsageError for an unknown name."""
    return cast(Runner, load_side(backend, "run"))
