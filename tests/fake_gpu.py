"""A CUDA runtime and a TensorRT that do on the host what the real ones do on a GPU, and note what they were asked.

"Device memory" is host memory, so that a wrong address, a missing copy or a stale graph gives wrong numbers. Work is
done at once, or recorded where its stream is being captured. What this cannot show is said in docs/tensorrt.md.
"""

# ruff: noqa: N815, ARG005 (names and signatures are those of the libraries)
from __future__ import annotations

import ctypes
import enum
from types import SimpleNamespace

import numpy as np


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700


OK = Status.cudaSuccess


class FakeCuda:
    """The functions of `cuda.bindings.runtime` that we call, with their way of returning (status, results...)."""

    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice="H2D", cudaMemcpyDeviceToHost="D2H", cudaMemcpyDeviceToDevice="D2D"
    )
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)

    def __init__(self, capability: tuple[int, int] = (8, 9)) -> None:
        self.capability = capability
        self.calls: list[str] = []
        self.memory: dict[int, ctypes.Array] = {}
        self.capturing: dict[int, list] = {}
        self.streams: set[int] = set()
        self.graphs: dict[object, list] = {}
        self.fails: dict[str, Status] = {}
        self._next = 1000

    def __getattribute__(self, name: str):
        """Every call is written down, and fails where a test wants it to."""
        value = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not callable(value):
            return value

        def called(*arguments):
            if name in self.fails:
                return (self.fails[name], None)
            if not name.startswith("cudaGetError"):
                self.calls.append(name.removeprefix("cuda"))
            return value(*arguments)

        return called

    def submit(self, stream: int, work) -> None:
        """Do it now, or write it down for the graph."""
        self.capturing[stream].append(work) if stream in self.capturing else work()

    def cudaGetErrorString(self, status):
        return OK, status.name.encode()

    def cudaGetDeviceCount(self):
        return OK, 1

    def cudaGetDevice(self):
        return OK, 0

    def cudaDeviceGetAttribute(self, attribute, device):
        return OK, self.capability[attribute - 75]

    def cudaStreamCreateWithFlags(self, flags):
        self._next += 1
        self.streams.add(self._next)
        return OK, self._next

    def cudaStreamSynchronize(self, stream):
        return (OK,)

    def cudaStreamDestroy(self, stream):
        self.streams.remove(stream)
        return (OK,)

    def cudaEventCreateWithFlags(self, flags):
        return OK, object()

    def cudaEventRecord(self, event, stream):
        return (OK,)

    def cudaStreamWaitEvent(self, stream, event, flags):
        return (OK,)

    def cudaEventDestroy(self, event):
        return (OK,)

    def _allocate(self, size):
        block = ctypes.create_string_buffer(b"\xff" * size, size)  # NaN where nothing was copied
        self.memory[ctypes.addressof(block)] = block
        return OK, ctypes.addressof(block)

    cudaMalloc = cudaMallocHost = _allocate

    def _release(self, address):
        del self.memory[address]
        return (OK,)

    cudaFree = cudaFreeHost = _release

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        self.submit(stream, lambda: ctypes.memmove(target, source, size))
        return (OK,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.capturing[stream] = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        return OK, self.capturing.pop(stream)

    def cudaGraphInstantiate(self, graph, flags):
        executable = object()
        self.graphs[executable] = list(graph)
        return OK, executable

    def cudaGraphDestroy(self, graph):
        return (OK,)

    def cudaGraphExecDestroy(self, executable):
        del self.graphs[executable]
        return (OK,)

    def cudaGraphLaunch(self, executable, stream):
        for work in self.graphs[executable]:
            work()
        return (OK,)


class FakeTensorRT:
    """Opens any plan as a network with twice the state's channels: see `compute`."""

    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE_GRAPH_CAPTURE")
    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    ILogger = type("ILogger", (), {"__init__": lambda self: None})
    Logger = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)

    def __init__(self, cuda: FakeCuda, version: str = "11.4.0", batch: tuple[int, int] = (1, 16), shape=(3, 4, 4)):
        self.cuda, self.__version__, self.batch = cuda, version, batch
        self.tensors = {
            "x": (np.float32, (-1, *shape)), "timestep": (np.int64, (-1,)), "class_labels": (np.int64, (-1,)),
            "prediction": (np.float32, (-1, 2 * shape[0], *shape[1:])),
        }  # fmt: skip
        self.contexts: list[FakeContext] = []
        self.opens = True

    def nptype(self, dtype):
        return dtype

    def Runtime(self, logger):
        def deserialize(plan):
            if not self.opens:
                logger.log(1, "Serialization assertion failed:\n version tag does not match")
                return None
            return FakeEngine(self)

        return SimpleNamespace(deserialize_cuda_engine=deserialize, load_runtime=lambda path: self.Runtime(logger))


class FakeEngine:
    device_memory_size_v2 = 256

    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt, self.names = trt, list(trt.tensors)
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_dtype(self, name):
        return self.trt.tensors[name][0]

    def get_tensor_shape(self, name):
        return self.trt.tensors[name][1]

    def get_tensor_mode(self, name):
        return "out" if name == "prediction" else "in"

    def create_runtime_config(self):
        config = SimpleNamespace(strategy=None, cuda_graph_strategy=None)
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        return config

    def create_execution_context(self, configuration):
        context = FakeContext(self, configuration)
        self.trt.contexts.append(context)
        return context


class FakeContext:
    def __init__(self, engine: FakeEngine, configuration) -> None:
        self.trt, self.configuration = engine.trt, configuration
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = None
        self.executions = 0

    def set_device_memory(self, address, size):
        assert address in self.trt.cuda.memory
        self.scratch = address

    def set_input_shape(self, name, shape):
        low, high = self.trt.batch
        self.shapes[name] = tuple(shape)
        return low <= shape[0] <= high

    def set_tensor_address(self, name, address):
        assert address in self.trt.cuda.memory, f"'{name}' is bound to memory that nobody allocated"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream in self.trt.cuda.streams
        assert self.scratch is not None
        assert self.addresses.keys() == self.trt.tensors.keys(), "a tensor has no address"
        self.executions += 1
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        rows = shapes["x"][0]

        def array(name):
            dtype, shape = self.trt.tensors[name]
            size = int(np.prod((rows, *shape[1:]))) * np.dtype(dtype).itemsize
            raw = (ctypes.c_byte * size).from_address(addresses[name])
            return np.frombuffer(raw, dtype).reshape(rows, *shape[1:])

        def work():
            inputs = {name: array(name) for name in self.trt.tensors if name != "prediction"}
            assert (inputs["class_labels"] >= 0).all(), "a row was never filled"
            array("prediction")[...] = compute(inputs)

        self.trt.cuda.calls.append(f"execute[{rows}]")
        self.trt.cuda.submit(stream, work)
        return True


def compute(inputs):
    """What FakeTensorRT's engine computes."""
    per_row = (inputs["timestep"] / 1024 + inputs["class_labels"] / 8)[:, None, None, None]
    return np.concatenate([inputs["x"] / 2 + per_row, inputs["x"] / 4 - per_row], axis=1).astype(np.float32)
