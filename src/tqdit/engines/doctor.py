"""What this machine can build and run, and what is missing: the report of `tqdit-doctor`.

Needs NumPy alone. A library is imported only to ask it for a GPU or for its fitness, and whatever it raises is a line
of the report. No path, name of a host or of a user, and nothing of the environment goes into it.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
from dataclasses import dataclass, field
from importlib import metadata, util
from typing import Literal

from tqdit.engines import cpu, cuda
from tqdit.engines.backends import backend_names, load_side
from tqdit.errors import TqditError, first_line
from tqdit.extras import install, installed_packages
from tqdit.version import __version__

# The newest PTX that a driver of a CUDA release reads (NVIDIA's PTX ISA, release notes).
PTX_OF_CUDA = {(12, 5): 85, (12, 6): 85, (12, 7): 86, (12, 8): 87, (12, 9): 88}
_DIRECTORIES = re.compile(r"(?<![\w.])~?/(?:[^\s/'\"():,;]+/)+")
Outcome = Literal["ok", "failed", "not run"]


@dataclass(frozen=True)
class Gpu:
    """A GPU that CUDA offers."""

    index: int
    name: str
    capability: str
    multiprocessors: int
    memory_bytes: int


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: the CUDA release that it serves and the newest PTX that it reads, or why there is none."""

    cuda: str = ""
    ptx: str = ""
    missing: str = ""


@dataclass(frozen=True)
class BackendState:
    """What one backend can do here."""

    builds: bool
    runs: bool
    why: str
    install: str = ""  # pip command for what is missing


@dataclass(frozen=True)
class Check:
    """One step of a proof."""

    what: str
    outcome: Outcome
    detail: str = ""
    layers: str = ""  # what the compiler said of the engine's layers


@dataclass(frozen=True)
class Report:
    """All of it, as it goes into a file."""

    tqdit: str
    python: str
    system: str
    cpus: int
    cpu_features: tuple[str, ...]
    packages: dict[str, str]
    driver: Driver
    gpus: tuple[Gpu, ...]
    backends: dict[str, BackendState]
    advice: tuple[str, ...]
    proof: tuple[Check, ...] = field(default=())

    @property
    def runs_something(self) -> bool:
        return any(state.runs for state in self.backends.values())

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.proof if check.outcome == "failed")


def examine() -> Report:
    """Look at this machine."""
    packages, (driver, gpus) = installed_packages(), find_gpus()
    backends = {name: backend_state(name, driver, gpus) for name in backend_names()}
    return Report(
        __version__, platform.python_version(), f"{platform.system()} {platform.machine()}", os.cpu_count() or 1,
        cpu.features(), packages, driver, gpus, backends, tuple(advise(packages, driver, gpus)),
    )  # fmt: skip


def find_gpus() -> tuple[Driver, tuple[Gpu, ...]]:
    """The driver and its GPUs; why there are none is in the first."""
    try:
        driver = cuda.driver()
        _call(driver.cuInit(0))
        version, count = _call(driver.cuDriverGetVersion()), _call(driver.cuDeviceGetCount())
        release = (version // 1000, version % 1000 // 10)
        gpus = tuple(_gpu(driver, index) for index in range(count))
    except Exception as error:  # of cuda's own classes, which depend on what is missing
        return Driver(missing=clean(first_line(error))), ()
    read = newest_ptx(release)
    return Driver(".".join(map(str, release)), f"{read // 10}.{read % 10}"), gpus


def newest_ptx(cuda_release: tuple[int, int]) -> int:
    """87 of CUDA 12.8. The minor versions were the same up to 12.4, and are from 13.0 on."""
    major, minor = cuda_release
    if major >= 13:
        return 90 + 10 * (major - 13) + minor
    return PTX_OF_CUDA.get(cuda_release, 80 + min(minor, 8) if major == 12 else 78)


def backend_state(name: str, driver: Driver, gpus: tuple[Gpu, ...]) -> BackendState:
    """Whether an engine of this backend can be built here, and whether it can run."""
    extra = extra_of(name, driver)
    runs_side = load_side(name, "run")
    missing = [module for module in getattr(runs_side, "MODULES", ()) if not _is_installed(module)]
    needs_gpu = getattr(runs_side, "NEEDS_GPU", False)
    if missing:
        return BackendState(False, False, f"{', '.join(missing)} is not installed", install(extra))
    runs, why = not needs_gpu or bool(gpus), "no GPU" if needs_gpu and not gpus else ""
    lacking = [module for module in ("onnx", "onnx_ir") if not _is_installed(module)]
    if lacking or not _is_installed("tqdit.engines.build"):
        what = ", ".join(lacking) or "tqdit (this is tqdit-runtime)"
        return BackendState(False, runs, f"building needs {what}", install("build") if lacking else "")
    try:
        fitness = importlib.import_module("tqdit.engines.build.backend").builder(name).fitness()
    except (TqditError, ImportError, OSError) as error:
        return BackendState(False, runs, clean(first_line(error)))
    builds = bool(fitness.score) if fitness.builds is None else fitness.builds
    return BackendState(builds, runs and bool(fitness.score), clean(why or fitness.reason))


def extra_of(backend: str, driver: Driver) -> str:
    """The extra that installs a backend's libraries for this driver."""
    if backend.startswith("tensorrt") and driver.cuda.startswith("12."):
        return f"{backend}-cu12"
    return backend


def advise(packages: dict[str, str], driver: Driver, gpus: tuple[Gpu, ...]) -> list[str]:
    """What does not fit together."""
    found = []
    if {"onnxruntime", "onnxruntime-gpu"} <= packages.keys():
        found.append("onnxruntime and onnxruntime-gpu overwrite each other's files: pip uninstall one of them")
    for name in ("tensorrt", "tensorrt-rtx"):
        of_13 = any(each.startswith(f"{name.replace('-', '_')}_cu13") for each in _distributions())
        if of_13 and driver.cuda and not driver.cuda.startswith("13."):
            found.append(
                f"{name} of CUDA 13 is installed, the driver serves CUDA {driver.cuda}: install a newer driver, or run "
                f"{install(f'{name}-cu12')}"
            )
    for gpu in gpus:
        least = "8.7" if int(gpu.capability.partition(".")[0]) >= 12 else "8.0"
        if driver.ptx and _numbers(driver.ptx) < _numbers(least):
            found.append(f"the driver reads PTX {driver.ptx}, the plugins of {gpu.name} are PTX {least}: update it")
        if gpu.capability == "10.3":
            found.append(
                f"{gpu.name} multiplies int8 slower than bfloat16: build with --precision fp8 or bf16 and compare"
            )
    if gpus and "tensorrt" in " ".join(packages) and "triton" not in packages and platform.system() == "Linux":
        found.append(f"without Triton the custom ops are compiled from their bodies: {install('triton')}")
    return found


def clean(text: str) -> str:
    """One line, in which a path is its last part."""
    return _DIRECTORIES.sub(".../", " ".join(str(text).split()))


def _gpu(driver: object, index: int) -> Gpu:
    device = cuda.find_device(index)
    memory = _call(driver.cuDeviceTotalMem(index))  # type: ignore[attr-defined]
    return Gpu(index, device.name, device.capability, device.multiprocessors, int(memory))


def _call(result: tuple[object, ...]) -> int:
    """The value of a driver's function, which gives an error and values."""
    error, *values = result
    if int(error):  # type: ignore[call-overload]
        raise RuntimeError(getattr(error, "name", f"error {error}"))
    return int(values[0]) if values else 0  # type: ignore[call-overload]


def _is_installed(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package
        return False


def _distributions() -> set[str]:
    return {str(one.metadata["Name"]).replace("-", "_") for one in metadata.distributions() if one.metadata["Name"]}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
