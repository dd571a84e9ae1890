"""The backends, one row each: a package with the modules `build` and `run`. Adding one changes only this file.

The seam between a model and what compiles it is a callable: inputs by name in, the one output out.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from tqdit.card import GraphCard
from tqdit.engines.bundle import Manifest
from tqdit.engines.config import BuildConfig, FloatType, Progress
from tqdit.errors import BackendError, UsageError

BACKENDS = {
    "onnxruntime": "tqdit.engines.backends.onnxruntime",
    "openvino": "tqdit.engines.backends.openvino",
    "tensorrt-rtx": "tqdit.engines.backends.tensorrt_rtx",
    "tensorrt": "tqdit.engines.backends.tensorrt",
}


class Engine(Protocol):
    """A compiled graph. Safe to call from several threads."""

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]: ...

    def close(self) -> None: ...


class Fitness(NamedTuple):
    """How well a backend suits this machine: the highest score is taken by `auto`, 0 is never taken."""

    score: int
    reason: str


class BuildRow(Protocol):
    OPTIONS: frozenset[str]  # fields of BuildConfig that it honours beyond the common ones
    CASTS_FLOATS: bool  # it brings the float parts into their type by itself and takes the file as it was exported

    def fitness(self) -> Fitness:
        """Whether an engine that is built here can also run here. Must not import a library that is missing."""
        ...

    def float_types(self, config: BuildConfig) -> tuple[FloatType, ...]:
        """Types that the target computes in without emulation, the preferred one first."""
        ...

    def build(self, source: Path, card: GraphCard, folder: Path, config: BuildConfig, progress: Progress) -> Manifest:
        """Compile `source` into files in `folder`, audit and describe them.

        `config` has its precision and float type chosen; unless the row casts by itself, the file is of that type.
        """
        ...


class RunRow(Protocol):
    def load(self, folder: Path, manifest: Manifest, file: str, threads: int | None) -> Engine:
        """Open one compiled file of a bundle."""
        ...


def choose_backend() -> tuple[str, str]:
    """(name, why) of the backend that suits this machine best."""
    found = {name: build_row(name).fitness() for name in BACKENDS}
    name = max(found, key=lambda one: found[one].score)
    if found[name].score == 0:
        reasons = "; ".join(f"{one}: {fitness.reason}" for one, fitness in found.items())
        raise BackendError(
            f"no backend can build and run an engine here ({reasons}). Run: pip install 'tqdit[onnxruntime]'"
        )
    others = "; ".join(f"{one}: {fitness.reason}" for one, fitness in found.items() if one != name)
    return name, found[name].reason + (f" (passed over: {others})" if others else "")


def build_row(backend: str) -> BuildRow:
    return cast(BuildRow, _module(backend, "build"))


def run_row(backend: str) -> RunRow:
    return cast(RunRow, _module(backend, "run"))


def _module(backend: str, name: str) -> object:
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend '{backend}'; this tqdit has {', '.join(BACKENDS)}.")
    return importlib.import_module(f"{BACKENDS[backend]}.{name}")
