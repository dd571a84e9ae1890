"""The little of CUDA that the runtime needs, through NVIDIA's cuda-python, which imports without a driver.

Errors of the driver become BackendError with the name that NVIDIA's documentation lists.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import util
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tqdit.errors import BackendError, UsageError
from tqdit.extras import need


@dataclass(frozen=True)
class Device:
    """The GPU that is current in this thread."""

    index: int
    capability: str  # such as '8.9'


def runtime() -> ModuleType:
    """The module of the CUDA runtime's functions."""
    return need("cuda.bindings.runtime", "cuda", "running on a GPU")


def installed() -> bool:
    with suppress(ModuleNotFoundError):
        return util.find_spec("cuda.bindings.runtime") is not None
    return False


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime; its one result, a tuple of several, or None."""
    rt = runtime()
    status, *results = getattr(rt, name)(*arguments)
    if int(status) != 0:
        text = rt.cudaGetErrorString(status)[1]
        raise BackendError(f"CUDA's {name} failed: {status.name} ({_decoded(text)}).")
    return results[0] if len(results) == 1 else tuple(results) or None


def find_device() -> Device:
    """The current GPU; BackendError in one line without a driver or a GPU."""
    rt = runtime()
    status, count = rt.cudaGetDeviceCount()
    if int(status) != 0 or not count:
        why = "no GPU" if int(status) == 0 else f"{status.name}: {_decoded(rt.cudaGetErrorString(status)[1])}"
        raise BackendError(
            f"no usable NVIDIA GPU here ({why}). Install NVIDIA's driver, or build for a backend that runs on this "
            "machine: tqdit-build --backend auto."
        )
    index = call("cudaGetDevice")
    numbers = [
        call("cudaDeviceGetAttribute", getattr(rt.cudaDeviceAttr, f"cudaDevAttrComputeCapability{part}"), index)
        for part in ("Major", "Minor")
    ]
    return Device(index, ".".join(map(str, numbers)))


@contextmanager
def on_device(index: int) -> Iterator[None]:
    """Make a GPU current in this thread, and the previous one again at the end."""
    before = call("cudaGetDevice")
    if before != index:
        call("cudaSetDevice", index)
    try:
        yield
    finally:
        if before != index:
            call("cudaSetDevice", before)


class Stream:
    """A stream that does not wait for the default stream, nor the default stream for it."""

    def __init__(self) -> None:
        self.handle = int(call("cudaStreamCreateWithFlags", runtime().cudaStreamNonBlocking))

    def synchronize(self) -> None:
        call("cudaStreamSynchronize", self.handle)

    def close(self) -> None:
        call("cudaStreamDestroy", self.handle)


def order_streams(first: int, then: int) -> None:
    """What is put on `then` from now on starts after what is on `first` now."""
    if first == then:
        return
    event = call("cudaEventCreateWithFlags", runtime().cudaEventDisableTiming)
    try:
        call("cudaEventRecord", event, first)
        call("cudaStreamWaitEvent", then, event, 0)
    finally:
        call("cudaEventDestroy", event)  # the driver keeps it until it has happened


class Memory:
    """Bytes on the GPU."""

    def __init__(self, size_bytes: int) -> None:
        self.address = int(call("cudaMalloc", max(size_bytes, 1)))

    def free(self) -> None:
        if self.address:
            call("cudaFree", self.address)
            self.address = 0


class PinnedArray:
    """Page-locked memory of the host, which the GPU copies without help: `array` is a NumPy view of it."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        kind = np.dtype(dtype)
        self.size_bytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        self.address = int(call("cudaMallocHost", max(self.size_bytes, 1)))
        raw = memoryview((ctypes.c_byte * self.size_bytes).from_address(self.address)).cast("B")
        self.array: NDArray[Any] = np.frombuffer(raw, dtype=kind).reshape(shape)

    def free(self) -> None:
        """The view must not be used afterwards."""
        if self.address:
            self.array = np.empty(0)
            call("cudaFreeHost", self.address)
            self.address = 0


def copy(target: int, source: int, size_bytes: int, kind: str, stream: int) -> None:
    """Put a copy on a stream; `kind` is HostToDevice, DeviceToHost or DeviceToDevice."""
    call("cudaMemcpyAsync", target, source, size_bytes, getattr(runtime().cudaMemcpyKind, f"cudaMemcpy{kind}"), stream)


class Graph:
    """What was put on a stream while it was captured, as one launch. Addresses and shapes are fixed in it."""

    def __init__(self, executable: Any) -> None:
        self._executable = executable

    def launch(self, stream: int) -> None:
        call("cudaGraphLaunch", self._executable, stream)

    def close(self) -> None:
        call("cudaGraphExecDestroy", self._executable)


class Capture:
    """Capture what the body puts on a stream: `with Capture(stream) as capture: ...`, then `capture.graph`.

    Thread-local, so that other threads of the program may go on allocating meanwhile.
    """

    def __init__(self, stream: int) -> None:
        self._stream = stream
        self.graph: Graph | None = None

    def __enter__(self) -> Capture:
        call("cudaStreamBeginCapture", self._stream, runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            with suppress(BackendError):  # the capture is spoilt; the first error is the one to tell
                call("cudaStreamEndCapture", self._stream)
            return
        captured = call("cudaStreamEndCapture", self._stream)
        try:
            self.graph = Graph(call("cudaGraphInstantiate", captured, 0))
        finally:
            call("cudaGraphDestroy", captured)


class DeviceArray:
    """An array in GPU memory, for cupy, torch, numba, pycuda and others, by `__cuda_array_interface__`.

    `stream` is the one on which its content is complete. The memory goes back when the array is collected.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, stream: int) -> None:
        self.shape, self.dtype, self.stream = shape, np.dtype(dtype), stream
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        self._memory = Memory(self.nbytes)

    @property
    def address(self) -> int:
        return self._memory.address

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
            "stream": self.stream or 1,  # 0 is not allowed there; 1 is the default stream
        }

    def numpy(self) -> NDArray[Any]:
        """A copy on the host, after everything on its stream."""
        out = np.empty(self.shape, self.dtype)
        copy(out.ctypes.data, self.address, self.nbytes, "DeviceToHost", self.stream)
        call("cudaStreamSynchronize", self.stream)
        return out

    def __del__(self) -> None:
        with suppress(BackendError, ImportError, AttributeError):  # at the end of a program the driver may be gone
            self._memory.free()  # waits for what still works on it


@dataclass(frozen=True)
class DeviceView:
    """Somebody else's array in GPU memory."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any  # kept alive


def view_array(array: Any, name: str, stream: int) -> DeviceView:
    """Read an array by `__cuda_array_interface__`, in order with `stream`; it must be contiguous."""
    described = getattr(array, "__cuda_array_interface__", None)
    if described is None:
        raise UsageError(f"'{name}' is {type(array).__name__}, expected an array with __cuda_array_interface__.")
    if (made_on := described.get("stream")) is not None:
        order_streams(int(made_on), stream)  # 1 and 2 are the handles of the default streams
    shape, strides = tuple(described["shape"]), described.get("strides")
    view = DeviceView(int(described["data"][0]), shape, np.dtype(described["typestr"]), array)
    if strides is not None and tuple(strides) != _contiguous(shape, view.dtype.itemsize):
        raise UsageError(f"'{name}' is not contiguous. Make it so (ascontiguousarray, contiguous()).")
    return view


def stream_handle(stream: Any) -> int:
    """The address of a stream: an int, or a stream of torch, cupy, pycuda, numba or cuda.core. None: the default."""
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


def _contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))


def _decoded(text: Any) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)
