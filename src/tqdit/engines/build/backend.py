"""What compiles a graph: the module `build` of each backend, and the choice of a backend."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from tqdit.card import GraphCard
from tqdit.engines import cpu
from tqdit.engines.backends import backend_names, load_side
from tqdit.engines.bundle import Artefact
from tqdit.engines.config import BuildConfig, FloatType, Progress
from tqdit.errors import BackendError
from tqdit.extras import install
from tqdit.onnx_file import OnnxFile


class Fitness(NamedTuple):
    """How well a backend suits this machine: `auto` takes the highest score, and never a score of 0."""

    score: int
    reason: str
    builds: bool | None = None  # whether it can be built here, if that is not whether it can run


class Builder(Protocol):
    """The module `build` of a backend."""

    OPTIONS: frozenset[str]  # fields of BuildConfig that it honours beyond the common ones
    TAKES_FP8: bool  # it compiles E4M3 products
    CASTS_FLOATS: bool  # it casts the float parts by itself and takes the file as it was exported

    def fitness(self) -> Fitness:
        """Whether an engine that is built here can also run here. Must not import a library that is missing."""
        ...

    def float_types(self, config: BuildConfig) -> tuple[FloatType, ...]:
        """Types that the target computes in without emulation, the preferred one first."""
        ...

    def place(self, config: BuildConfig) -> str:
        """What an engine is built for: a kind of processor, or the GPU that is here with its driver."""
        ...

    def build(
        self, source: OnnxFile, decoder: OnnxFile | None, card: GraphCard, folder: Path, config: BuildConfig,
        progress: Progress,
    ) -> Artefact:  # fmt: skip
        """Compile `source` and the decoder of its VAE into files in `folder`; audit (`check_audit`) and describe them.

        `config` has its precision and float type chosen. Unless CASTS_FLOATS, the file is of that type. `card`
        describes the file as it is to be compiled: without a quantization if that was stripped.
        """
        ...


def processor() -> str:
    """The kind of processor here: an engine of a CPU was verified, and its layers were audited, on one of its kind."""
    return " ".join((platform.machine(), *cpu.features()))


def builder(backend: str) -> Builder:
    """The build side of a backend. Raises UsageError for an unknown name."""
    return cast(Builder, load_side(backend, "build"))


def choose_backend() -> tuple[str, str]:
    """(name, why) of the backend that suits this machine best."""
    found = {name: builder(name).fitness() for name in backend_names()}
    name = max(found, key=lambda one: found[one].score)
    if found[name].score == 0:
        reasons = "; ".join(f"{one}: {fitness.reason}" for one, fitness in found.items())
        raise BackendError(f"no backend can build and run an engine here ({reasons}). Run: {install('onnxruntime')}")
    others = "; ".join(f"{one}: {fitness.reason}" for one, fitness in found.items() if one != name)
    return name, found[name].reason + (f" (passed over: {others})" if others else "")
