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


def runner(backend: str) -> Runner:
    """The run side of a backend. Raises UsageError for an unknown name."""
    return cast(Runner, load_side(backend, "run"))
