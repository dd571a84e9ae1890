"""What runs a compiled graph: the module `run` of each backend."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from tqdit.bounds import MOST_THREADS, check_count
from tqdit.card import GraphCard
from tqdit.engines.backends import load_side
from tqdit.engines.bundle import FORECAST, Manifest, check_parts, read_manifest
from tqdit.engines.gpu import GpuChoice, GpuShare
from tqdit.engines.process import Process
from tqdit.errors import BackendError, UsageError

Made = TypeVar("Made")


class Engine(Protocol):
    """A compiled graph: inputs by name in, its first output out. Safe to call from several threads.

    An engine of a GPU may also have `place`, a text that names the GPU and the library. One that takes arrays there has
    `run_on_device` and `gpu`, the index of the GPU.
    """

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]: ...

    def outputs(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], ...]:
        """All outputs of the graph: the prediction, and the residual if it returns that."""
        ...

    def close(self) -> None: ...


class Runner(Protocol):
    """The module `run` of a backend.

    It may also say TAKES_DEVICE = True (`load` takes the index of a GPU), STREAMS_WEIGHTS = True (and a budget for
    weights), NEEDS_GPU = True, and the MODULES of the libraries that it imports, for `tqdit-doctor`.
    """

    def load(self, folder: Path, manifest: Manifest, file: str, threads: int | None, **gpu: int) -> Engine:
        """Open one compiled file of a bundle. device=INDEX chooses a GPU if the module says TAKES_DEVICE = True, and
        weight_budget=BYTES limits its weights there if it says STREAMS_WEIGHTS = True.
        """
        ...


class InParts:
    """An engine whose graph takes a fixed number of rows, called with any multiple of it."""

    def __init__(self, engine: Engine, rows: int) -> None:
        self._engine, self._rows = engine, rows
        self.place: str | None = getattr(engine, "place", None)

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        return np.concatenate([self._engine(part).copy() for part in self._parts(inputs)])

    def outputs(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], ...]:
        made = [self._engine.outputs(part) for part in self._parts(inputs)]
        return tuple(np.concatenate(each) for each in zip(*made, strict=True))

    def _parts(self, inputs: Mapping[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        count = len(next(iter(inputs.values())))
        for start in range(0, count, self._rows):
            yield {name: array[start : start + self._rows] for name, array in inputs.items()}

    def close(self) -> None:
        self._engine.close()


def open_engine(
    folder: Path, manifest: Manifest, file: str, threads: int | None = None, device: GpuChoice = None
) -> Engine:
    """One compiled file of a bundle, for any number of rows that it was built for. device: of a GPU."""
    if file.startswith(f"{FORECAST}/"):
        folder, manifest, file = folder / FORECAST, manifest.of_forecast, file.removeprefix(f"{FORECAST}/")
    side, gpu = runner(manifest.backend), GpuShare.of(device)
    chosen = {} if gpu.index is None else {"device": gpu.index}
    if chosen and not getattr(side, "TAKES_DEVICE", False):
        raise UsageError(f"{folder}: --device is the index of a GPU; {manifest.backend} engines run on the CPU.")
    if gpu.weight_budget_bytes is not None:
        if not getattr(side, "STREAMS_WEIGHTS", False):
            raise UsageError(
                f"{folder}: --weight-budget has no meaning for {manifest.backend}; engines of tensorrt and "
                "tensorrt-rtx have it. Leave it out."
            )
        chosen["weight_budget"] = gpu.weight_budget_bytes
    engine, card = side.load(folder, manifest, file, threads, **chosen), manifest.card
    part = card if file == manifest.entry else card.vae
    rows = part.rows if part else None
    return engine if rows is None else InParts(engine, rows)


def runner(backend: str) -> Runner:
    """The run side of a backend. Raises UsageError for an unknown name."""
    return cast(Runner, load_side(backend, "run"))


class OpenEngine:
    """An engine in the process that opened it: refused in a fork, which would wait for threads that it does not have.

    A fork does not free its copy either, for the same reason: not by `close`, and not when the fork ends.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._process = engine, Process()
        self.place: str | None = getattr(engine, "place", None)
        self.gpu: int | None = getattr(engine, "gpu", None)

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        return self._checked(self._engine, inputs)

    def outputs(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], ...]:
        return self._checked(self._engine.outputs, inputs)

    def _checked(self, call: Callable[[Mapping[str, NDArray[Any]]], Made], inputs: Mapping[str, NDArray[Any]]) -> Made:
        self._process.check("engine")
        try:
            return call(inputs)
        except KeyError as error:
            raise BackendError(f"the engine takes an input {error}, which its manifest does not name.") from error

    def run_on_device(self, inputs: Mapping[str, Any], stream: Any, out: Any) -> Any:
        """GPU arrays in, a GPU array out. Raises UsageError if the backend takes none."""
        self._process.check("engine")
        run = getattr(self._engine, "run_on_device", None)
        if run is None:
            raise UsageError(
                "this engine takes no arrays on a GPU; those of tensorrt and tensorrt-rtx do, unless their graph has a "
                "fixed number of rows. Pass NumPy arrays in a call."
            )
        return run(inputs, stream, out)

    def close(self) -> None:
        if self._process.is_here:
            self._engine.close()

    def __del__(self) -> None:
        if not self._process.is_here:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._engine))


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that no engine can have. None leaves it to the backend."""
    if threads is not None:
        check_count("threads", threads, 1, MOST_THREADS)


def open_bundle(
    path: str | Path, threads: int | None, device: GpuChoice = None
) -> tuple[Manifest, Callable[[str], OpenEngine]]:
    """The manifest of a bundle that tqdit-build wrote, and what opens its files, after checking every one of them.

    threads: CPU threads per call; None leaves it to the backend. device: index of the GPU that runs it, or a
    `GpuShare`. Raises FileFormatError for a damaged bundle, UsageError for a step graph; opening a file raises
    BackendError if it cannot run here.
    """
    check_threads(threads)
    device = GpuShare.of(device)
    folder = Path(path)
    manifest = read_manifest(folder)
    check_graph(manifest.card, f"{folder}:")
    check_parts(folder, manifest)

    def load(file: str) -> OpenEngine:
        return OpenEngine(open_engine(folder, manifest, file, threads, device))

    return manifest, load


def check_graph(card: GraphCard, where: str = "this engine") -> None:
    """Refuse a step graph."""
    if card.graph != "denoiser":
        raise UsageError(
            f"{where} holds a step graph, which has its sampler inside and is for programs in other languages. Export "
            "again without --graph step."
        )
