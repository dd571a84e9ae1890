"""A CUDA and a TensorRT that do on the host what the real ones do on a GPU, and note what they were asked.

"Device memory" is host memory, so that a wrong address, a missing copy or a stale graph gives wrong numbers. Work is
done at once, or recorded where its stream is being captured. What this cannot show is said in docs/tensorrt.md.
"""

# ruff: noqa: ARG005 (names and signatures are those of the libraries)
from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np


class CUDAError(Exception):
    __module__ = "cuda.core._utils.cuda_utils"  # the real one's


class FakeCuda:
    """What we use of `cuda.core` and of `cuda.bindings.driver`."""

    LEGACY = 1

    def __init__(self, capability: tuple[int, int] = (8, 9)) -> None:
        self.capability = capability
        self.calls: list[str] = []
        self.memory: dict[int, ctypes.Array] = {}
        self.capturing: dict[int, list] = {}
        self.streams: set[int] = set()
        self.graphs: set[FakeGraph] = set()
        self.fails: dict[str, str] = {}  # call -> name of the driver's error
        self.context = 0  # of the thread; the primary one is 1
        self.current: int | None = None  # index of the GPU
        self.pools = True
        self.version = 12080  # of the driver
        self.kernels = {}
        self.names, self.multiprocessors = ["NVIDIA L4", "NVIDIA GeForce RTX 4090"], [58, 128]
        self._next = 1000

    def note(self, call: str, needs_context: bool = True) -> None:
        """Write a call down; fail where a test wants it to, and without a context as the driver does."""
        error = self.fails.get(call, "" if self.context or not needs_context else "CUDA_ERROR_INVALID_CONTEXT")
        if error:
            raise CUDAError(f"{error}: what the documentation says. And more.")
        self.calls.append(call)

    def submit(self, stream: int, work) -> None:
        """Do it now, or write it down for the graph."""
        self.capturing[stream].append(work) if stream in self.capturing else work()

    def reserve(self, size: int) -> int:
        block = ctypes.create_string_buffer(b"\xff" * size, size)  # NaN where nothing was copied
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def new_stream(self) -> int:
        self._next += 1
        self.streams.add(self._next)
        return self._next

    def cuInit(self, flags):
        return (0,)

    def cuDriverGetVersion(self):
        return 0, self.version

    def cuDeviceGetCount(self):
        return 0, len(self.names)

    def cuDeviceTotalMem(self, index):
        return 0, 24 * 10**9

    def cuModuleLoadData(self, image):
        """Kernels are Python functions of host addresses, by their entry name: `kernels`."""
        assert image.endswith(b"\0")
        self.note("cuModuleLoadData")
        return 0, image.decode().rstrip("\0")

    def cuModuleGetFunction(self, module, name):
        found = name.decode() in module and name.decode() in self.kernels
        return (0, name.decode()) if found else (500, None)

    def cuModuleUnload(self, module):
        self.note("cuModuleUnload")
        return (0,)

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, params, extra):
        assert stream in self.streams
        assert (gy, gz, by, bz, extra) == (1, 1, 1, 1, 0)
        values, kinds = params
        for value, kind in zip(values, kinds, strict=True):
            assert (value in self.memory) == (kind is ctypes.c_void_p), "a pointer that nobody allocated"
        self.note("cuLaunchKernel")
        self.submit(stream, lambda: self.kernels[function](*values))
        return (0,)

    def cuCtxGetCurrent(self):
        return 0, self.context

    def cuCtxSetCurrent(self, context):
        self.context = context

    def Device(self, index=None):
        if index not in (None, *range(len(self.names))):
            raise ValueError(f"device_id must be within [0, {len(self.names)}), got {index}")
        return FakeDevice(self, index or 0)

    @property
    def Stream(self):
        return SimpleNamespace(from_handle=lambda handle: FakeStream(self, handle))

    @property
    def Buffer(self):
        return SimpleNamespace(from_handle=lambda ptr, size, owner=None: FakeBuffer(self, ptr, size, owner))

    def LegacyPinnedMemoryResource(self):
        return FakeMemory(self, "pinned")

    def DeviceMemoryResource(self, device, options):
        return FakeMemory(self, "device")

    def DeviceMemoryResourceOptions(self):
        return None


class FakeDevice:
    def __init__(self, cuda: FakeCuda, device_id: int) -> None:
        self.cuda, self.device_id, self.name = cuda, device_id, cuda.names[device_id]
        self.compute_capability = cuda.capability
        self.properties = SimpleNamespace(
            memory_pools_supported=cuda.pools, multiprocessor_count=cuda.multiprocessors[device_id]
        )

    @property
    def memory_resource(self):
        return FakeMemory(self.cuda, "shared")

    def set_current(self):
        self.cuda.current = self.device_id
        self.cuda.context = 1

    def create_stream(self):
        self.cuda.note("create_stream")
        return FakeStream(self.cuda, self.cuda.new_stream())

    def sync(self):
        self.cuda.note("device.sync")


class FakeStream:
    def __init__(self, cuda: FakeCuda, handle: int) -> None:
        self.cuda, self.handle = cuda, handle

    def sync(self):
        self.cuda.note("sync")

    def wait(self, stream):
        self.cuda.note("wait")

    def close(self):
        self.cuda.streams.remove(self.handle)

    def create_graph_builder(self):
        return FakeGraphBuilder(self.cuda, self.handle)


class FakeMemory:
    def __init__(self, cuda: FakeCuda, kind: str) -> None:
        self.cuda, self.kind = cuda, kind

    def allocate(self, size, *, stream=None):
        self.cuda.note(f"allocate {self.kind}")
        assert (stream is None) == (self.kind == "pinned"), "the real one asks for a stream"
        return FakeBuffer(self.cuda, self.cuda.reserve(size), size, ours=True)


class FakeBuffer:
    def __init__(self, cuda: FakeCuda, handle: int, size: int, owner=None, ours: bool = False) -> None:
        self.cuda, self.handle, self.size, self.owner, self.ours = cuda, handle, size, owner, ours

    def copy_from(self, src, *, stream):
        assert src.size == self.size, "the real one refuses buffers of different sizes"
        self.cuda.note("copy")
        target, source = self.handle, src.handle
        self.cuda.submit(stream.handle, lambda: ctypes.memmove(target, source, src.size))

    def copy_to(self, dst, *, stream):
        dst.copy_from(self, stream=stream)

    def close(self):
        if self.ours and self.handle:
            self.cuda.calls.append("free")
            del self.cuda.memory[self.handle]
        self.handle = 0


class FakeGraphBuilder:
    def __init__(self, cuda: FakeCuda, stream: int) -> None:
        self.cuda, self.stream, self.work = cuda, stream, None

    def begin_building(self, mode):
        assert mode == "thread_local"
        self.cuda.note("begin_building")
        self.cuda.capturing[self.stream] = []

    def end_building(self):
        self.cuda.note("end_building")
        self.work = self.cuda.capturing.pop(self.stream)
        return self

    def complete(self):
        self.cuda.note("complete")
        return FakeGraph(self.cuda, self.work)

    def close(self):
        self.cuda.calls.append("close builder")
        self.cuda.capturing.pop(self.stream, None)


class FakeGraph:
    def __init__(self, cuda: FakeCuda, work) -> None:
        self.cuda, self.work = cuda, work
        cuda.graphs.add(self)

    def launch(self, stream):
        self.cuda.note("launch")
        for work in self.work:
            work()

    def close(self):
        self.cuda.graphs.remove(self)


OUTPUTS = ("prediction", "residual")


class FakeTensorRT:
    """Opens any plan as a network with twice the state's channels: see `compute`."""

    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE_GRAPH_CAPTURE")
    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    ILogger = type("ILogger", (), {"__init__": lambda self: None})
    Logger = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)

    def __init__(
        self, cuda: FakeCuda, version: str = "11.4.0", batch: tuple[int, int] = (1, 32), shape=(3, 4, 4), residual=None
    ):
        """residual: shape of a row of a second output, `residual_of`."""
        self.cuda, self.__version__, self.batch = cuda, version, batch
        self.tensors = {
            "x": (np.float32, (-1, *shape)), "timestep": (np.int64, (-1,)), "class_labels": (np.int64, (-1,)),
            "prediction": (np.float32, (-1, 2 * shape[0], *shape[1:])),
        }  # fmt: skip
        if residual is not None:
            self.tensors["residual"] = (np.float32, (-1, *residual))
        self.contexts: list[FakeContext] = []
        self.opens = self.streams = True

    def nptype(self, dtype):
        return dtype

    def make_cache(self):
        """Kernels that were compiled at run time: one for each shape."""
        cache = SimpleNamespace(content=set())

        def deserialize(blob):
            release, _, content = bytes(blob).decode().partition(":")
            cache.content |= set(content.split(",")) if release == self.__version__ else set()
            return release == self.__version__

        cache.deserialize = deserialize
        cache.serialize = lambda: f"{self.__version__}:{','.join(sorted(cache.content))}".encode()
        return cache

    def Runtime(self, logger):
        def deserialize(plan):
            if not self.opens:
                logger.log(1, "Serialization assertion failed:\n version tag does not match")
                return None
            return FakeEngine(self)

        return SimpleNamespace(deserialize_cuda_engine=deserialize, load_runtime=lambda path: self.Runtime(logger))


class FakeEngine:
    """Its weights are 4096 bytes; those beyond the budget need scratch memory."""

    streamable_weights_size = 4096

    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt, self.names = trt, list(trt.tensors)
        self.num_io_tensors = len(self.names)
        self._budget = self.streamable_weights_size

    @property
    def weight_streaming_budget_v2(self):
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget):
        assert not self.trt.contexts, "the real one refuses a budget while there are contexts"
        self.trt.cuda.calls.append(f"budget[{budget}]")
        self._budget = budget if self.trt.streams else self._budget

    @property
    def device_memory_size_v2(self):
        return 256 + (self.streamable_weights_size - self._budget) // 4

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_dtype(self, name):
        return self.trt.tensors[name][0]

    def get_tensor_shape(self, name):
        return self.trt.tensors[name][1]

    def get_tensor_mode(self, name):
        return "out" if name in OUTPUTS else "in"

    def create_runtime_config(self):
        config = SimpleNamespace(strategy=None, cuda_graph_strategy=None)
        config.create_runtime_cache, config.runtime_cache = self.trt.make_cache, None
        config.set_runtime_cache = lambda cache: setattr(config, "runtime_cache", cache)
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
        assert len(self.trt.cuda.memory[address]) >= size
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
        kernels = getattr(self.configuration, "runtime_cache", None)
        if kernels is not None and str(self.shapes["x"][0]) not in kernels.content:
            self.trt.cuda.calls.append(f"compile[{self.shapes['x'][0]}]")
            kernels.content.add(str(self.shapes["x"][0]))
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        rows = shapes["x"][0]

        def array(name):
            dtype, shape = self.trt.tensors[name]
            size = int(np.prod((rows, *shape[1:]))) * np.dtype(dtype).itemsize
            raw = (ctypes.c_byte * size).from_address(addresses[name])
            return np.frombuffer(raw, dtype).reshape(rows, *shape[1:])

        def work():
            inputs = {name: array(name) for name in self.trt.tensors if name not in OUTPUTS}
            assert (inputs["class_labels"] >= 0).all(), "a row was never filled"
            array("prediction")[...] = compute(inputs)
            if "residual" in self.trt.tensors:
                array("residual")[...] = residual_of(inputs, self.trt.tensors["residual"][1][1:])

        self.trt.cuda.calls.append(f"execute[{rows}]")
        self.trt.cuda.submit(stream, work)
        return True


def compute(inputs):
    """What FakeTensorRT's engine computes."""
    per_row = (inputs["timestep"] / 1024 + inputs["class_labels"] / 8)[:, None, None, None]
    return np.concatenate([inputs["x"] / 2 + per_row, inputs["x"] / 4 - per_row], axis=1).astype(np.float32)


def residual_of(inputs, shape):
    """What its second output holds: of each row, another number for each token."""
    of_row = inputs["x"].reshape(len(inputs["x"]), -1).sum(1) + inputs["timestep"] / 512
    return (of_row[:, None] + np.arange(np.prod(shape))).reshape(-1, *shape).astype(np.float32)
