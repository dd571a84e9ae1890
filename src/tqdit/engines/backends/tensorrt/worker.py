"""Compiling, in a process of its own: `python -m tqdit.engines.backends.tensorrt.worker`.

Why a process: the first logger that a builder gets stays the logger of the whole process, and the log is our proof.
Polygraphy chooses between the two libraries when it is imported. A compiler that aborts ends only this process. Ctrl-C
ends it at once, and its memory is freed. The job is one line of JSON on standard input, which stays open: EOF means the
parent died; exit. Messages are lines of JSON on what was standard output.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from tqdit.engines import cuda
from tqdit.engines.backends.tensorrt.layers import Layer
from tqdit.engines.backends.tensorrt.library import LIBRARIES, Library, Log
from tqdit.engines.config import LAYERS_FILE, BuildConfig
from tqdit.errors import BackendError, TqditError, UsageError
from tqdit.plugins.tensorrt import register_plugins

Tell = Callable[[dict[str, Any]], None]
PROGRESS_INTERVAL_S = 0.1
FIRST_FP8 = (8, 9)  # the least compute capability with FP8 products


@dataclass(frozen=True)
class Job:
    """One graph to compile. Shapes are those of the ONNX file with its batch dimension in `batch`."""

    backend: str
    source: str  # ONNX file
    plan: str  # file to write
    batch: tuple[int, int, int]
    config: BuildConfig = field(default_factory=BuildConfig)
    plugins_for: str | None = None  # compute capability; None: the custom ops get no plugins
    device: int | None = None  # GPU that TensorRT compiles on; None: no GPU is asked for
    base: str | None = None  # plan whose weights are to be replaced by those of the file; None: compile
    changed: tuple[str, ...] = ()  # with base: the weights that differ

    def to_json(self) -> bytes:
        return msgspec.json.encode(self, enc_hook=str)  # of the one path in it

    @classmethod
    def from_json(cls, text: str) -> Job:
        return msgspec.json.decode(text, type=cls, dec_hook=lambda kind, value: kind(value))


@dataclass(frozen=True)
class Compiled:
    """What a worker says about the plan that it wrote."""

    version: str  # of the library
    targets: tuple[str, ...]
    layers: tuple[Layer, ...]
    plugins: tuple[str, ...]  # ONNX nodes that became plugins


def compile_job(job: Job, tell: Tell) -> Compiled:
    """Compile, write the plan and describe it; with a base, replace its weights instead, which changes no layer."""
    library, config = LIBRARIES[job.backend], job.config
    trt = library.load(f"--backend {job.backend}")
    library.check_offers(trt, config)
    if job.base is not None:
        return _refit(job, library, trt, tell)
    targets = choose_targets(library, library.targets(trt), config.targets, config.precision)
    if job.device is not None:
        cuda.find_device(job.device).handle.set_current()
    library.choose_in_polygraphy()
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath, Profile
    from polygraphy.backend.trt import util as polygraphy_util
    from polygraphy.exception import PolygraphyException

    log = Log(trt)
    polygraphy_util.TRT_LOGGER = log.logger  # Polygraphy's own would keep neither errors nor layers
    if job.plugins_for is not None:
        register_plugins(_order(job.plugins_for))
    try:
        builder, network, parser = NetworkFromOnnxPath(job.source, strongly_typed=True)()
        settings: dict[str, Any] = {
            "profiles": [_profile(network, job.batch, Profile())],
            "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
            "progress_monitor": _monitor(trt, tell),
        }
        if config.refit:
            settings["refittable"] = True
        if config.weight_streaming:
            settings["weight_streaming"] = True
        if targets:
            settings["compute_capabilities"] = [_order(target) for target in targets]
        timings = None if config.timing_cache is None else str(config.timing_cache)
        if config.workspace_bytes is not None:
            settings["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: config.workspace_bytes}
        if timings is not None and Path(timings).is_file():
            settings["load_timing_cache"] = timings
        if config.optimization_level is not None:
            settings["builder_optimization_level"] = config.optimization_level
        if config.version_compatible:
            settings |= {"version_compatible": True, "exclude_lean_runtime": config.lean_runtime == "exclude"}
        plan = EngineBytesFromNetwork(
            (builder, network, parser), library.config_loader(**settings), save_timing_cache=timings
        )()
        report = library.report(trt, plan, log)
    except PolygraphyException as error:
        raise BackendError(_reason(library, trt.__version__, log.errors or [str(error)], targets)) from error
    Path(job.plan).write_bytes(memoryview(plan))
    Path(job.plan).with_name(LAYERS_FILE).write_text(report, encoding="utf-8")
    return Compiled(trt.__version__, targets, library.layers(report), _plugin_layers(trt, network))


def _refit(job: Job, library: Library, trt: ModuleType, tell: Tell) -> Compiled:
    tell({"kind": "progress", "what": "Replacing weights", "done": 0, "total": 1})
    if job.device is not None:
        cuda.find_device(job.device).handle.set_current()
    if job.plugins_for is not None:
        register_plugins(_order(job.plugins_for))
    assert job.base is not None
    plan = library.refit(trt, Path(job.base).read_bytes(), job.source, job.changed)
    Path(job.plan).write_bytes(memoryview(plan))
    return Compiled(trt.__version__, (), (), ())


def choose_targets(
    library: Library, known: tuple[str, ...], asked: tuple[str, ...], precision: str | None = None
) -> tuple[str, ...]:
    """The compute capabilities to compile for: by default all from 8.0 on, for fp8 from 8.9. Refuses one that the
    library lacks.
    """
    unknown = [target for target in asked if target not in known]
    if unknown and library.cross_compiles:
        raise UsageError(
            f"--target {', '.join(unknown)}: {library.title} compiles for {', '.join(known)}. For data-centre GPUs use "
            "--backend tensorrt on a machine that has one."
        )
    first = FIRST_FP8 if precision == "fp8" else (8, 0)
    return asked or tuple(target for target in known if _order(target) >= first)


def _profile(network: Any, batch: tuple[int, int, int], profile: Any) -> Any:
    """Every input's first dimension is the batch; the others must be fixed."""
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if any(size < 0 for size in shape[1:]):
            raise BackendError(f"input '{tensor.name}' has the shape {shape}; only its first dimension may vary.")
        if shape and shape[0] < 0:
            profile.add(tensor.name, *((rows, *shape[1:]) for rows in batch))
    return profile


def _monitor(trt: ModuleType, tell: Tell) -> Any:
    """The library's progress as messages: at the start of every phase, then ten a second at most."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}
            self.next = 0.0

        def phase_start(self, phase: str, _parent: str | None, steps: int) -> None:
            self.totals[phase] = steps
            tell({"kind": "progress", "what": phase, "done": 0, "total": steps})

        def step_complete(self, phase: str, step: int) -> bool:
            if time.monotonic() >= self.next:
                self.next = time.monotonic() + PROGRESS_INTERVAL_S
                tell({"kind": "progress", "what": phase, "done": step + 1, "total": self.totals.get(phase, 0)})
            return True

        def phase_finish(self, phase: str) -> None:
            total = self.totals.pop(phase, 0)
            tell({"kind": "progress", "what": phase, "done": total, "total": total})

    return Monitor()


def _plugin_layers(trt: ModuleType, network: Any) -> tuple[str, ...]:
    """Names of the ONNX nodes that became plugins."""
    kind = getattr(trt.LayerType, "PLUGIN_V3", None)
    found = (network.get_layer(index) for index in range(network.num_layers))
    return tuple(layer.name for layer in found if kind is not None and layer.type == kind)


def _reason(library: Library, version: str, errors: list[str], targets: tuple[str, ...]) -> str:
    """One line with what is known to help."""
    telling = (error for error in errors if "ERROR:" in error or "Error Code" in error or "ssertion" in error)
    text = " ".join(next(telling, errors[0]).split())
    advice = ""
    if "FP32 GEMM is not supported" in text:
        advice = " Compute capability 7.5 has no float32 products, which quantized files need: leave it out."
    elif "HW-specific datatypes" in text:
        advice = f" A type of this file does not exist on one of {', '.join(targets)}; choose another --float-type."
    elif "graph_jit" in text and "CUDA_SUCCESS" in text:  # TensorRT-RTX 1.7.1, with any weight that can be replaced
        advice = " With --refit it needs a GPU and NVIDIA's driver to compile, too: build there, or leave --refit out."
    elif "workspace limit" in text:
        advice = " Raise --workspace or leave it out."
    return f"{library.title} {version} cannot compile it ({text}).{advice}"


def _order(target: str) -> tuple[int, int]:
    """(8, 9) of '8.9'."""
    major, minor = target.split(".")
    return int(major), int(minor)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides; it ends us
    messages = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what the libraries print joins their errors
    job = Job.from_json(sys.stdin.readline())
    threading.Thread(target=_leave_with_caller, daemon=True).start()

    def tell(message: dict[str, Any]) -> None:
        messages.write(msgspec.json.encode(message) + b"\n")

    try:
        tell({"kind": "done", "compiled": compile_job(job, tell)})
    except TqditError as error:
        tell({"kind": "refused", "error": type(error).__name__, "text": str(error)})
    os._exit(0)  # the libraries' own teardown is not ours to wait for


def _leave_with_caller() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
