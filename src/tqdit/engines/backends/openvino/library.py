"""Getting hold of OpenVINO, and the settings under which it computes what the file says."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdit.errors import BackendError
from tqdit.extras import need

DEVICE = "CPU"
HINTS = {"fp32": "f32", "bf16": "bf16"}  # float types that the device computes in, by OpenVINO's names


def load_library() -> ModuleType:
    """The `openvino` module."""
    return need("openvino", "openvino", "this backend")


def core_of(ov: ModuleType) -> Any:
    """The one `ov.Core` of the process, which stays.

    Its CPU plugin gives the thread that loads it a larger stack for signals (AMX needs one). When the last Core goes,
    the plugin frees that stack, in whichever thread that happens, and the next signal of the first thread crashes it.
    """
    return _core(ov, os.getpid())


@cache
def _core(ov: ModuleType, process: int) -> Any:
    return ov.Core()


def has_bfloat16(ov: ModuleType) -> bool:
    """Whether this CPU has instructions for bfloat16 (AVX-512 BF16 or AMX)."""
    return "BF16" in core_of(ov).get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")


def settings(float_type: str, threads: int | None) -> dict[str, Any]:
    """Properties of every compilation, when auditing and when running.

    By default OpenVINO computes in bfloat16 if the CPU has it, and rounds the inputs of products with int8 weights
    alone (dynamic quantization), which is not in the table. It also ties its threads, and the caller's, to the first
    cores, so that two processes with one thread each would share one core.
    """
    chosen: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": HINTS[float_type],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    if threads is not None:
        chosen["INFERENCE_NUM_THREADS"] = threads
    return chosen


def compile_file(ov: ModuleType, file: Path, float_type: str, threads: int | None = None) -> Any:
    """An IR as OpenVINO's compiled model, its batch still open.

    Raises BackendError if the file or the device does not allow it.
    """
    core = core_of(ov)
    try:
        return core.compile_model(core.read_model(file), DEVICE, settings(float_type, threads))
    except RuntimeError as error:  # what OpenVINO raises whatever went wrong
        raise BackendError(f"{file}: OpenVINO {release(ov)} cannot compile it ({reason(error)}).") from error


def release(ov: ModuleType) -> str:
    """'2026.4.1' of '2026.4.1-22982-e213a147257-releases/2026/4'."""
    return str(ov.__version__).split("-")[0]


def reason(error: Exception) -> str:
    """The last line of OpenVINO's message; those before name its own source files."""
    return [line.strip() for line in str(error).splitlines() if line.strip()][-1]
