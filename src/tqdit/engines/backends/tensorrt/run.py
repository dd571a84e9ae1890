"""Run a plan: buffers bound once for each number of rows, one stream, a CUDA graph after the first run."""

from __future__ import annotations

import mmap
import os
import threading
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

from tqdit.engines.backends.tensorrt import cuda
from tqdit.engines.backends.tensorrt.library import LIBRARIES, TENSORRT, Library, Log
from tqdit.engines.bundle import Manifest, check_machine, check_parts, read_manifest
from tqdit.engines.process import Process
from tqdit.errors import BackendError, UsageError

SHAPES_KEPT = 16  # numbers of rows whose buffers and graph are kept; the longest unused one goes first
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

    def __init__(self, library: Library, file: Path, manifest: Manifest, trt: ModuleType) -> None:
        self._library, self._trt, self._file = library, trt, file
        self._device = cuda.find_device()
        self._lock, self._process = threading.Lock(), Process()
        self._bound: OrderedDict[int, Bound] = OrderedDict()
        is_entry = file.name == manifest.entry  # the decoder has one row for each image
        self._rows_per_image = manifest.card.rows_per_image if is_entry else 1
        self._least = 1
        if manifest.batch is not None and is_entry:
            self._least = manifest.batch.least * self._rows_per_image
        with cuda.on_device(self._device):
            self._engine, *self._kept = _open_plan(library, trt, file, manifest)
            self._inputs, (self._output,) = _tensors(trt, self._engine)
            self._pool = cuda.make_pool(self._device)
            self._stream = self._device.handle.create_stream()  # neither it nor the default stream waits for the other
            self._scratch = self._allocate(max(1, int(self._engine.device_memory_size_v2)))

    @classmethod
    def open(cls, path: str | Path) -> TensorRTEngine:
        """Open the graph of a bundle of `tensorrt` or `tensorrt-rtx`, after checking every file of it.

        For `run_on_device`; `Sampler.open` samples. Raises FileFormatError for a damaged bundle, BackendError if it
        cannot run here.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        check_parts(folder, manifest)
        if manifest.backend not in LIBRARIES:
            raise UsageError(f"{folder}: built for {manifest.backend}, expected {' or '.join(LIBRARIES)}.")
        return open_engine(LIBRARIES[manifest.backend], folder, manifest, manifest.entry)

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """NumPy in, NumPy out. Fewer rows than the engine was made for are filled up with copies of the last one."""
        with self._turn():
            rows = self._rows({name: np.shape(value) for name, value in inputs.items()})
            bound = self._bind(max(rows, self._least))
            for tensor in self._inputs:
                pinned = bound.host[tensor.name]
                pinned.array[:rows] = inputs[tensor.name]
                pinned.array[rows:] = pinned.array[rows - 1]
                bound.device[tensor.name].copy_from(pinned.buffer, stream=self._stream)
            self._run(bound)
            out = bound.host[self._output.name]
            out.buffer.copy_from(bound.device[self._output.name], stream=self._stream)
            self._stream.sync()
            self._capture(bound)
            return out.array[:rows].astype(np.float32, copy=True)

    def run_on_device(self, inputs: Mapping[str, Any], stream: Any = None, out: Any = None) -> Any:
        """GPU arrays in, a GPU array out, without waiting: (B, ...) as the graph names them.

        inputs: arrays of cupy, torch, pycuda or numba, by `__cuda_array_interface__`, contiguous and of the graph's
        types. stream: the caller's, a handle or a stream of any of these; the engine starts after what is on it, and
        what the caller puts on it afterwards starts after the engine. out: an array to fill; None makes one. Raises
        UsageError for arrays that do not fit.
        """
        caller = cuda.open_stream(stream)
        with self._turn():
            mine = self._stream
            mine.wait(caller)
            views = {t.name: cuda.view_array(inputs[t.name], t.name, mine) for t in self._inputs if t.name in inputs}
            rows = self._rows({name: view.shape for name, view in views.items()})
            if rows < self._least:
                raise UsageError(f"{rows} row(s), but the engine was built for at least {self._least}.")
            bound = self._bind(rows)
            for tensor in self._inputs:
                view = views[tensor.name]
                if view.dtype != tensor.dtype:
                    raise UsageError(f"'{tensor.name}' is {view.dtype}, the engine takes {tensor.dtype}.")
                bound.device[tensor.name].copy_from(view.buffer, stream=mine)
            self._run(bound)
            shape, dtype, made = (rows, *self._output.tail), self._output.dtype, bound.device[self._output.name]
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
                self._engine = None
                self._scratch.close()
                self._stream.close()

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

    def _bind(self, rows: int) -> Bound:
        """Buffers and a context for this many rows: made at the first call, then used again."""
        if rows in self._bound:
            self._bound.move_to_end(rows)
            return self._bound[rows]
        while len(self._bound) >= SHAPES_KEPT:
            self._stream.sync()
            self._bound.popitem(last=False)[1].close()
        context = self._library.create_context(self._trt, self._engine)
        if context is None:
            raise BackendError(f"{self._file}: no execution context could be made; the GPU may be out of memory.")
        context.set_device_memory(int(self._scratch.handle), int(self._engine.device_memory_size_v2))
        bound = Bound(context, {}, {})
        try:
            for tensor in (*self._inputs, self._output):
                shape = (rows, *tensor.tail)
                if tensor is not self._output and not context.set_input_shape(tensor.name, shape):
                    images = -(-rows // self._rows_per_image)
                    raise UsageError(
                        f"the engine was not built for {rows} row(s). Use fewer at a time, or build it with a larger "
                        f"range of images: tqdit-build --batch 1,{max(1, images // 2)},{images}."
                    )
                bound.host[tensor.name] = cuda.PinnedArray(shape, tensor.dtype)
                bound.device[tensor.name] = self._allocate(bound.host[tensor.name].buffer.size)
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
        """After the first run, which let the library finish what it does lazily; RTX captures by itself."""
        if bound.graph is not None or self._library.is_rtx:
            return
        with closing(self._stream.create_graph_builder()) as capture:
            capture.begin_building("thread_local")  # other threads of the program may go on allocating
            self._enqueue(bound)
            bound.graph = capture.end_building().complete()

    def _allocate(self, size_bytes: int) -> Any:
        return self._pool.allocate(size_bytes, stream=self._stream)


def open_engine(
    library: Library, folder: Path, manifest: Manifest, file: str, threads: int | None = None
) -> TensorRTEngine:
    """Open one file of a bundle; refuses another GPU, another release of the library and another kind of machine.

    `threads` has no meaning for a GPU.
    """
    trt = library.load("this engine")
    device = cuda.find_device()
    offered = manifest.target.get("compute_capabilities", "").split(",")
    if device.capability not in offered:
        raise BackendError(
            f"{folder}: built for compute capability {', '.join(offered)}, this GPU has {device.capability}. "
            f"Build the engine for it{': tqdit-build --target ' + device.capability if library.cross_compiles else ''}."
        )
    check_machine(folder, manifest)
    built_by = manifest.versions.get(library.module, "0")
    compatible = "version_compatible" in manifest.target
    if not library.runs_engine_of(built_by, trt.__version__, compatible):
        raise BackendError(
            f"{folder}: built by {library.title} {built_by}, installed is {trt.__version__}. Build the engine "
            f"again, or run: pip install {library.module.replace('_', '-')}=={built_by}"
        )
    return TensorRTEngine(library, folder / file, manifest, trt)


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
