"""The little of CUDA that the runtime needs beside NVIDIA's cuda.core, which imports without a driver."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tqdit.errors import BackendError, UsageError
from tqdit.extras import need

KERNEL_MODULE = Path("/proc/driver/nvidia/version")
# CU_DEVICE_ATTRIBUTE_: COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR, MULTIPROCESSOR_COUNT (cuda.h)
KIND_ATTRIBUTES = (75, 76, 16)


def core() -> ModuleType:
    """cuda.core."""
    return need("cuda.core", "cuda", "running on a GPU")


def driver() -> ModuleType:
    """The module of the CUDA driver's functions."""
    return need("cuda.bindings.driver", "cuda", "running on a GPU")


def installed() -> bool:
    with suppress(ModuleNotFoundError):
        return util.find_spec("cuda.core") is not None
    return False


@dataclass(frozen=True)
class Device:
    """A GPU."""

    handle: Any  # cuda.core's
    capability: str  # such as '8.9'
    name: str = ""
    multiprocessors: int = 0
    index: int | None = None

    @property
    def facts(self) -> dict[str, str]:
        """What the manifest of a plan says of the GPU that it was made on."""
        return {"device": self.name, "multiprocessors": str(self.multiprocessors)} if self.name else {}

    @property
    def kind(self) -> str:
        """What compiled and checked kernels depend on besides the library: the chip and its driver."""
        return _kind(self.name, self.capability, self.multiprocessors, driver().cuDriverGetVersion()[1])


def kind_of(index: int) -> str:
    """`Device.kind` of a GPU, by the driver's own library: for engines that run without cuda.core.

    Raises BackendError without a driver or such a GPU.
    """
    try:
        library = driver_library()
    except OSError as error:
        raise BackendError(f"no driver of an NVIDIA GPU here ({_line(error)}). Install NVIDIA's driver.") from error

    def ask(function: str, *arguments: Any) -> None:
        code = getattr(library, function)(*arguments)
        if code != 0:
            raise BackendError(f"{function} of NVIDIA's driver failed for GPU {index} with error {code}.")

    def number(function: str, *arguments: Any) -> int:
        value = ctypes.c_int()
        ask(function, ctypes.byref(value), *arguments)
        return value.value

    ask("cuInit", 0)
    device, name = number("cuDeviceGet", index), ctypes.create_string_buffer(256)
    ask("cuDeviceGetName", name, len(name), device)
    major, minor, multiprocessors = (number("cuDeviceGetAttribute", each, device) for each in KIND_ATTRIBUTES)
    return _kind(name.value.decode(), f"{major}.{minor}", multiprocessors, number("cuDriverGetVersion"))


def driver_library() -> Any:
    """The driver as a library of C functions. Raises OSError if there is none."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def _kind(name: str, capability: str, multiprocessors: int, version: int) -> str:
    served = f"driver {driver_release()} of CUDA {version // 1000}.{version % 1000 // 10}".replace("  ", " ")
    return f"{name} {capability}, {multiprocessors} multiprocessors, {served}"


def driver_release() -> str:
    """Such as '570.124.06', since several drivers serve one release of CUDA; '' where Linux does not say it."""
    with suppress(OSError, UnicodeError):
        found = re.search(r"\s(\d{3,}(?:\.\d+)+)\s", KERNEL_MODULE.read_text(encoding="utf-8").partition("\n")[0])
        return found[1] if found else ""
    return ""


def find_device(index: int | None = None) -> Device:
    """A GPU by its index, or the one that is current in this thread; BackendError in one line without a driver or GPU.

    Indices count from 0 in CUDA's order, among those that CUDA_VISIBLE_DEVICES leaves.
    """
    library = core()
    try:
        device = library.Device(index)
    except Exception as error:  # its class depends on what is missing
        raise BackendError(
            f"no usable NVIDIA GPU{'' if index is None else f' {index}'} here ({_line(error)}). Install NVIDIA's "
            "driver, or build for a backend that runs on this machine: tqdit-build --backend auto."
        ) from error
    capability = ".".join(map(str, device.compute_capability))
    return Device(device, capability, device.name, device.properties.multiprocessor_count, device.device_id)


@contextmanager
def on_device(device: Device) -> Iterator[None]:
    """Make a GPU's primary context current in this thread, and the previous context again at the end.

    Errors of the driver become BackendError with the name that NVIDIA's documentation lists.
    """
    try:
        _, before = driver().cuCtxGetCurrent()  # cuda.core does not put back a context that it did not make
        device.handle.set_current()
        try:
            yield
        finally:
            if int(before):
                driver().cuCtxSetCurrent(before)
    except Exception as error:
        if not type(error).__module__.startswith("cuda."):  # cuda.core exports no class of its errors
            raise
        raise BackendError(f"CUDA failed: {_line(error)}.") from error


def make_pool(device: Device) -> Any:
    """Where device memory comes from. What is freed goes back to the driver; cuda.core's shared pool would keep it."""
    if device.handle.properties.memory_pools_supported:
        return core().DeviceMemoryResource(device.handle, core().DeviceMemoryResourceOptions())
    return device.handle.memory_resource


def size_bytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


class PinnedArray:
    """Page-locked memory of the host, which the GPU copies without help: `array` is a NumPy view of `buffer`."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.buffer = core().LegacyPinnedMemoryResource().allocate(size_bytes(shape, dtype))
        raw = (ctypes.c_byte * self.buffer.size).from_address(int(self.buffer.handle))
        self.array: NDArray[Any] = np.frombuffer(raw, dtype).reshape(shape)


class DeviceArray:
    """An array in GPU memory, for cupy, torch, numba, pycuda and others, by `__cuda_array_interface__`.

    `stream` is the one on which its content is complete. The memory goes back when the array is collected.
    """

    def __init__(self, device: Device, buffer: Any, shape: tuple[int, ...], dtype: DTypeLike, stream: Any) -> None:
        self.shape, self.dtype, self.stream = shape, np.dtype(dtype), stream
        self._device, self._buffer = device, buffer

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (int(self._buffer.handle), False),
            "strides": None,
            "version": 3,
            "stream": int(self.stream.handle),
        }

    def numpy(self) -> NDArray[Any]:
        """A copy on the host, after everything on its stream."""
        out = np.empty(self.shape, self.dtype)
        with on_device(self._device):
            self._buffer.copy_to(core().Buffer.from_handle(out.ctypes.data, out.nbytes), stream=self.stream)
            self.stream.sync()
        return out

    def __del__(self) -> None:
        with suppress(Exception), on_device(self._device):  # at the end of a program the driver may be gone
            self._device.handle.sync()  # any stream may still work on it
            self._buffer.close()


class DeviceView(NamedTuple):
    """Somebody else's array in GPU memory."""

    buffer: Any  # cuda.core's; keeps the array alive
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def view_array(array: Any, name: str, stream: Any) -> DeviceView:
    """Read an array by `__cuda_array_interface__`, in order with `stream`; it must be contiguous."""
    described = getattr(array, "__cuda_array_interface__", None)
    if described is None:
        raise UsageError(f"'{name}' is {type(array).__name__}, expected an array with __cuda_array_interface__.")
    if (made_on := described.get("stream")) is not None:
        stream.wait(open_stream(int(made_on)))
    shape, strides, dtype = tuple(described["shape"]), described.get("strides"), np.dtype(described["typestr"])
    contiguous = tuple(size_bytes(shape[axis + 1 :], dtype) for axis in range(len(shape)))
    if strides is not None and tuple(strides) != contiguous:
        raise UsageError(f"'{name}' is not contiguous. Make it so (ascontiguousarray, contiguous()).")
    address = int(described["data"][0])
    return DeviceView(core().Buffer.from_handle(address, size_bytes(shape, dtype), owner=array), shape, dtype)


def open_stream(stream: Any) -> Any:
    """cuda.core's stream for an address, or for a stream of torch, cupy, pycuda, numba or cuda.core. None: the default.

    1 and 2 are the addresses of the default streams.
    """
    return core().Stream.from_handle(_address(stream) or 1)


def _address(stream: Any) -> int:
    if stream is None:
        return 0
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for attribute in ("cuda_stream", "ptr", "handle"):
        if hasattr(stream, attribute):
            value = getattr(stream, attribute)
            return int(getattr(value, "value", value) or 0)
    try:
        return int(stream)
    except (TypeError, ValueError):
        raise UsageError(f"{type(stream).__name__} is not a CUDA stream. Pass its address as an int.") from None


def _line(error: Exception) -> str:
    """The first sentence of a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")
