"""Run a plan: buffers bound once for each bucket of rows, one stream, a CUDA graph after the first run.

Rows are filled up to 1, 2, 4, 8, 16, ..., so that a batcher whose number of rows changes at every step meets contexts
and graphs that are there. TensorRT 11.1 and 11.2 also leak memory when plugins change their shapes (NVIDIA/TensorRT
issue 4849).
"""

from __future__ import annotations

import mmap
import os
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.engines import cuda
from tqdit.engines.backends.tensorrt.library import TENSORRT, Library, Log, RuntimeCache
from tqdit.engines.bundle import Manifest, check_machine
from tqdit.engines.process import Process
from tqdit.errors import BackendError, TqditWarning, UsageError, first_line
from tqdit.files import cache_folder

SHAPES_KEPT = 16  # buckets of rows whose buffers and graph are kept; the longest unused one goes first
ALLOW_CODE = "TQDIT_ALLOW_ENGINE_CODE"
LEAN_LIBRARY = "TQDIT_TENSORRT_LEAN"


@dataclass(frozen=True)
class Tensor:
    """An input or output of the engine."""

    name: str
    dtype: np.dtype[Any]
    tail: tuple[int, ...]  # its shape without the rows


@dataclass
class Bound:
    """An execution context with everything that it works on, for one number of rows."""

    context: Any
    device: dict[str, Any]  # cuda.core's buffers
    host: dict[str, cuda.PinnedArray]
    runs: int = 0
    graph: Any = None  # cuda.core's

    def close(self) -> None:
        self.context = None
        if self.graph is not None:
            self.graph.close()
        for buffer in (*self.device.values(), *(array.buffer for array in self.host.values())):
            buffer.close()


class TensorRTEngine:
    """One plan. Safe to call from several threads: they take turns, as the GPU would have them do anyway."""

    def __init__(
        self, library: Library, file: Path, manifest: Manifest, trt: ModuleType, device: int | None = None,
        weight_budget: int | None = None,
    ) -> None:  # fmt: skip
        self._library, self._trt, self._file = library, trt, file
        self._device = cuda.find_device(device)
        self.gpu = self._device.index
        self.place = f"{self._device.kind}, {library.title} {trt.__version__}"
        self._captures = not library.is_rtx
        self._cache = RuntimeCache(_cache_file(manifest, file, self.place)) if library.is_rtx else None
        self._lock, self._process = threading.Lock(), Process()
        self._bound: OrderedDict[int, Bound] = OrderedDict()
        is_entry = file.name == manifest.entry  # the decoder has one row for each image
        self._rows_per_image = manifest.card.rows_per_image if is_entry else 1
        self._least, self._most = 1, 0  # rows; 0: the plan says
        if manifest.batch is not None and is_entry:
            self._least, _, self._most = manifest.batch.rows(self._rows_per_image)
        elif is_entry and manifest.card.rows:
            self._least = self._most = manifest.card.rows
        with cuda.on_device(self._device):
            self._engine, *self._kept = _open_plan(library, trt, file, manifest)
            if weight_budget is not None and is_entry:  # before contexts and their memory, whose size depends on it
                _limit_weights(self._engine, weight_budget, file, f"{library.title} {trt.__version__}")
                self._captures = False  # whether a graph may hold copies of weights is not documented
            self._inputs, self._outputs = _tensors(trt, self._engine)
            self._output = self._outputs[0]
            self._pool = cuda.make_pool(self._device)
            self._stream = self._device.handle.create_stream()  # neither it nor the default stream waits for the other
            self._scratch = self._allocate(max(1, int(self._engine.device_memory_size_v2)))

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """NumPy in, NumPy out. Rows are filled up to the next bucket with copies of the last one."""
        return self._call(inputs, self._outputs[:1])[0]

    def outputs(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], ...]:
        """As a call; all outputs."""
        return self._call(inputs, self._outputs)

    def _call(self, inputs: Mapping[str, NDArray[Any]], wanted: tuple[Tensor, ...]) -> tuple[NDArray[np.float32], ...]:
        with self._turn():
            rows = self._rows({name: np.shape(value) for name, value in inputs.items()})
            bound = self._bind(self._bucket(rows))
            for tensor in self._inputs:
                pinned = bound.host[tensor.name]
                pinned.array[:rows] = inputs[tensor.name]
                pinned.array[rows:] = pinned.array[rows - 1]
                bound.device[tensor.name].copy_from(pinned.buffer, stream=self._stream)
            self._run(bound)
            made = [bound.host[output.name] for output in wanted]
            for output, out in zip(wanted, made, strict=True):
                out.buffer.copy_from(bound.device[output.name], stream=self._stream)
            self._stream.sync()
            self._capture(bound)
            return tuple(out.array[:rows].astype(np.float32, copy=True) for out in made)

    def run_on_device(self, inputs: Mapping[str, Any], stream: Any = None, out: Any = None) -> Any:
        """GPU arrays in, a GPU array out, without waiting: (B, ...) as the graph names them.

        inputs: arrays of cupy, torch, pycuda or numba, by `__cuda_array_interface__`, contiguous and of the graph's
        types. stream: the caller's, a handle or a stream of any of these; the engine starts after what is on it, and
        what the caller puts on it afterwards starts after the engine. out: an array to fill; None makes one. Rows are
        filled up to the next bucket with those of earlier calls. Raises UsageError for arrays that do not fit.
        """
        caller = cuda.open_stream(stream)
        with self._turn():
            mine = self._stream
            mine.wait(caller)
            views = {t.name: cuda.view_array(inputs[t.name], t.name, mine) for t in self._inputs if t.name in inputs}
            rows = self._rows({name: view.shape for name, view in views.items()})
            bound = self._bind(self._bucket(rows))
            for tensor in self._inputs:
                view = views[tensor.name]
                if view.dtype != tensor.dtype:
                    raise UsageError(f"'{tensor.name}' is {view.dtype}, the engine takes {tensor.dtype}.")
                _begin(bound.device[tensor.name], view.buffer.size).copy_from(view.buffer, stream=mine)
            self._run(bound)
            shape, dtype = (rows, *self._output.tail), self._output.dtype
            made = _begin(bound.device[self._output.name], cuda.size_bytes(shape, dtype))
            if out is None:
                target = self._allocate(made.size)
                out = cuda.DeviceArray(self._device, target, shape, dtype, caller)
            else:
                target, *given = cuda.view_array(out, "out", mine)
                if given != [shape, dtype]:
                    raise UsageError(f"'out' is {given[1]} {given[0]}, the engine makes {dtype} {shape}.")
            target.copy_from(made, stream=mine)
            caller.wait(mine)
            if bound.runs == 1:
                mine.sync()
                self._capture(bound)
            return out

    def close(self) -> None:
        """Free everything on the GPU. The engine cannot be called afterwards; closing twice does nothing."""
        with self._lock:
            if self._engine is None:
                return
            with cuda.on_device(self._device):
                self._stream.sync()
                for bound in self._bound.values():
                    bound.close()
                self._bound.clear()
                if self._cache is not None:
                    self._cache.save()
                self._engine = None
                self._scratch.close()
                self._stream.close()

    @property
    def captures(self) -> bool:
        """Whether calls are replayed from CUDA graphs, ours or those of TensorRT-RTX."""
        return self._captures or self._library.is_rtx

    @contextmanager
    def _turn(self) -> Iterator[None]:
        self._process.check("engine")
        with self._lock:
            if self._engine is None:
                raise UsageError("this engine is closed. Open the bundle again.")
            with cuda.on_device(self._device):
                yield

    def _rows(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The number of rows, the same in every input."""
        missing = [tensor.name for tensor in self._inputs if tensor.name not in shapes]
        if missing:
            raise UsageError(f"the engine also takes {', '.join(missing)}.")
        rows = shapes[self._inputs[0].name][0]
        for tensor in self._inputs:
            if tuple(shapes[tensor.name]) != (rows, *tensor.tail):
                raise UsageError(
                    f"'{tensor.name}' has the shape {tuple(shapes[tensor.name])}, expected {(rows, *tensor.tail)}."
                )
        return rows

    def _bucket(self, rows: int) -> int:
        """The number of rows that a call of `rows` is filled up to: a power of two, or the limits of the plan."""
        if rows > self._most > 0:
            return rows  # which the plan refuses
        filled = max(1 << (rows - 1).bit_length(), self._least)
        return min(filled, self._most or filled)

    def _bind(self, rows: int) -> Bound:
        """Buffers and a context for this many rows: made at the first call, then used again."""
        if rows in self._bound:
            self._bound.move_to_end(rows)
            return self._bound[rows]
        while len(self._bound) >= SHAPES_KEPT:
            self._stream.sync()
            self._bound.popitem(last=False)[1].close()
        context = self._library.create_context(self._trt, self._engine, self._cache)
        if context is None:
            raise BackendError(f"{self._file}: no execution context could be made; the GPU may be out of memory.")
        context.set_device_memory(int(self._scratch.handle), int(self._engine.device_memory_size_v2))
        bound = Bound(context, {}, {})
        try:
            for tensor in (*self._inputs, *self._outputs):
                shape = (rows, *tensor.tail)
                if tensor in self._inputs and not context.set_input_shape(tensor.name, shape):
                    images = -(-rows // self._rows_per_image)
                    raise UsageError(
                        f"the engine was not built for {rows} row(s). Use fewer at a time, or build it with a larger "
                        f"range of images: tqdit-build --batch 1,{max(1, images // 2)},{images}."
                    )
                bound.host[tensor.name] = cuda.PinnedArray(shape, tensor.dtype)
                bound.device[tensor.name] = self._allocate(bound.host[tensor.name].buffer.size)
                if tensor in self._inputs:  # rows that no caller fills hold values that a network takes
                    bound.host[tensor.name].array[...] = 0
                    bound.device[tensor.name].copy_from(bound.host[tensor.name].buffer, stream=self._stream)
                if not context.set_tensor_address(tensor.name, int(bound.device[tensor.name].handle)):
                    raise BackendError(f"{self._file}: the address of '{tensor.name}' was refused.")
        except Exception:
            bound.close()
            raise
        self._bound[rows] = bound
        return bound

    def _run(self, bound: Bound) -> None:
        bound.runs += 1
        if bound.graph is not None:
            bound.graph.launch(self._stream)
        else:
            self._enqueue(bound)

    def _enqueue(self, bound: Bound) -> None:
        if not bound.context.execute_async_v3(int(self._stream.handle)):
            raise BackendError(f"{self._file}: {self._library.title} could not run the engine (its log says why).")

    def _capture(self, bound: Bound) -> None:
        """After the first run, which let the library finish what it does lazily; RTX captures by itself.

        Where it fails, this engine goes on without graphs: a call then takes a little longer.
        """
        if bound.runs == 1 and self._cache is not None:
            self._cache.save()
        if bound.graph is not None or not self._captures:
            return
        try:
            with closing(self._stream.create_graph_builder()) as capture:
                capture.begin_building("thread_local")  # other threads of the program may go on allocating
                self._enqueue(bound)
                bound.graph = capture.end_building().complete()
        except Exception as error:
            if not (isinstance(error, BackendError) or type(error).__module__.startswith("cuda.")):
                raise
            self._captures = False
            warnings.warn(
                f"{self._file}: no CUDA graph could be captured ({first_line(error)}); the engine runs without.",
                TqditWarning, stacklevel=2,
            )  # fmt: skip

    def _allocate(self, size_bytes: int) -> Any:
        return self._pool.allocate(size_bytes, stream=self._stream)


def _cache_file(manifest: Manifest, file: Path, place: str) -> Path:
    """Where what TensorRT-RTX compiles for one plan, kind of GPU, driver and release is kept."""
    plan = manifest.files[file.name].sha256 if file.name in manifest.files else file.name
    kind = re.sub(r"\W+", "-", place).strip("-")
    return cache_folder("tensorrt-rtx") / f"{plan[:32]}-{kind}.cache"


def _begin(buffer: Any, size_bytes: int) -> Any:
    """The first bytes of a buffer, as one of its own."""
    if size_bytes == buffer.size:
        return buffer
    return cuda.core().Buffer.from_handle(int(buffer.handle), size_bytes, owner=buffer)


def open_engine(
    library: Library, folder: Path, manifest: Manifest, file: str, threads: int | None = None,
    device: int | None = None, weight_budget: int | None = None,
) -> TensorRTEngine:  # fmt: skip
    """Open one file of a bundle; refuses another GPU, another release of the library and another kind of machine.

    `threads` has no meaning for a GPU. device: its index; None: the current one. weight_budget: bytes of weights on
    it at most; None: all.
    """
    if weight_budget is not None and not manifest.streams_weights:
        raise UsageError(
            f"{folder}: cannot be sampled with --weight-budget, since all its weights lie on the GPU. Leave it out, or "
            "build the engine with --weight-streaming."
        )
    trt = library.load("this engine")
    gpu = cuda.find_device(device)
    offered = manifest.target.get("compute_capabilities", "").split(",")
    if gpu.capability not in offered:
        raise BackendError(
            f"{folder}: built for compute capability {', '.join(offered)}, this GPU has {gpu.capability}. "
            f"Build the engine for it{': tqdit-build --target ' + gpu.capability if library.cross_compiles else ''}."
        )
    _check_device(folder, manifest, gpu)
    check_machine(folder, manifest)
    built_by = manifest.versions.get(library.module, "0")
    compatible = "version_compatible" in manifest.target
    if not library.runs_engine_of(built_by, trt.__version__, compatible):
        raise BackendError(
            f"{folder}: built by {library.title} {built_by}, installed is {trt.__version__}. Build the engine "
            f"again, or run: pip install {library.module.replace('_', '-')}=={built_by}"
        )
    return TensorRTEngine(library, folder / file, manifest, trt, device, weight_budget)


def _limit_weights(engine: Any, budget: int, file: Path, release: str) -> None:
    """Leave all but `budget` bytes of the weights in the host's memory. Raises UsageError if the library cannot."""
    if not hasattr(engine, "weight_streaming_budget_v2"):
        raise UsageError(f"sampling with --weight-budget: {release} has no weight_streaming_budget_v2. Leave it out.")
    size = int(engine.streamable_weights_size)  # 0 of a network whose weights are all too small
    engine.weight_streaming_budget_v2 = min(budget, size)
    if int(engine.weight_streaming_budget_v2) != min(budget, size):
        raise BackendError(
            f"{file}: {release} refused to leave {size - min(budget, size)} bytes of weights to the host."
        )


def _check_device(folder: Path, manifest: Manifest, gpu: cuda.Device) -> None:
    """Refuse a plan that was tuned for another chip: of one compute capability, an L4 has 58 multiprocessors and an
    RTX 4090 has 128. A mere difference in the name (other memory, another board) is a warning.
    """
    built, here = manifest.target, gpu.facts
    if not built.get("device") or not here or built["device"] == here["device"]:
        return
    if built.get("multiprocessors") != here["multiprocessors"]:
        raise BackendError(
            f"{folder}: built on {built['device']} with {built.get('multiprocessors')} multiprocessors, this GPU is "
            f"{here['device']} with {here['multiprocessors']}. Build it on this GPU, or choose another one (--device)."
        )
    warnings.warn(f"{folder}: built on {built['device']}, this GPU is {here['device']}. Build it here if it is slow.",
                  TqditWarning, stacklevel=2)  # fmt: skip


TAKES_DEVICE = STREAMS_WEIGHTS = NEEDS_GPU = True
MODULES = (TENSORRT.module, "cuda.core")
load = partial(open_engine, TENSORRT)


def _open_plan(library: Library, trt: ModuleType, file: Path, manifest: Manifest) -> tuple[Any, ...]:
    """An open plan, then what must live as long as it."""
    log = Log(trt)
    runtime = trt.Runtime(log.logger)
    lean = manifest.target.get("version_compatible")
    if lean == "embed":
        if os.environ.get(ALLOW_CODE) != "1":
            raise BackendError(
                f"{file}: this version-compatible plan carries program code (a lean runtime). If you trust where it "
                f"comes from, set {ALLOW_CODE}=1, or build it with --exclude-lean-runtime."
            )
        runtime.engine_host_code_allowed = True
    elif lean == "exclude" and manifest.versions.get(library.module) != trt.__version__:
        path = os.environ.get(LEAN_LIBRARY)
        if path is None:
            raise BackendError(
                f"{file}: needs the lean runtime of TensorRT {manifest.versions.get(library.module)}; set "
                f"{LEAN_LIBRARY} to the path of its libnvinfer_lean."
            )
        runtime = runtime.load_runtime(path)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        reason = log.errors[0] if log.errors else "it gave no reason"
        raise BackendError(f"{file}: {library.title} {trt.__version__} cannot open it ({' '.join(reason.split())}).")
    return engine, runtime, log


def _tensors(trt: ModuleType, engine: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and outputs in the engine's order."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
        tensor = Tensor(name, dtype, tuple(engine.get_tensor_shape(name))[1:])
        (inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs).append(tensor)
    return tuple(inputs), tuple(outputs)
