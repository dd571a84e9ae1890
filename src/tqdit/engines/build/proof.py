"""Proof that this machine computes what it should: `tqdit-doctor --prove`.

Kernels are loaded and launched through the driver as TensorRT does it, each plugin in each of its tactics, and compared
with the op in NumPy. Engines are built of an ONNX file, verified and compared with ONNX Runtime. A step that fails is a
line of the report and stops no other.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.engines import cuda
from tqdit.engines.backends.onnxruntime.library import load_library
from tqdit.engines.backends.onnxruntime.providers import PROVIDERS
from tqdit.engines.bundle import CALLS_FILE, Manifest
from tqdit.engines.config import LAYERS_KEPT, BuildConfig
from tqdit.engines.doctor import Check, clean
from tqdit.engines.run.backend import open_engine
from tqdit.engines.run.sampler import Sampler
from tqdit.errors import BackendError, TqditError, first_line
from tqdit.extras import need_part
from tqdit.files import read_npz
from tqdit.golden import GoldenCalls, relative_errors

Array = NDArray[Any]
BITS, HIGH_STEP, HEAD = 8, 1 / 127, 72
SHORT, LONG = 197, 300  # tokens: scores that stay on the chip, and two passes over the keys
# sum (y - reference)^2 / sum reference^2: float16 results with codes that flip at ties, and pictures of two backends
KERNEL_LIMIT, PICTURE_LIMIT = 1e-4, 0.05
STEPS = 4
ON_CPUS = ("onnxruntime", "openvino")
LAYERS_TOLD = " The compiler's own list of layers is in the report."


@dataclass(frozen=True, eq=False)
class Case:
    """One launch of one kernel, and what must come of it."""

    what: str
    kernel: Any  # tqdit.plugins.kernels.Kernel
    launch: Any  # tqdit.plugins.kernels.Launch
    inputs: tuple[Array, ...]
    expected: tuple[Array, ...]


def prove_kernels(device: int | None = None) -> Iterator[Check]:
    """Each plugin in each tactic against its reference; nothing is run without a GPU."""
    try:
        need_part("tqdit.plugins", "proving the plugins")
        gpu = cuda.find_device(device)
        cases = list(kernel_cases())
    except TqditError as error:
        yield Check("plugins", "not run", clean(first_line(error)))
        return
    for case in cases:
        yield _checked(case.what, lambda case=case: _launch(case, gpu))  # type: ignore[misc]


def kernel_cases() -> Iterator[Case]:
    """Small inputs for every kernel: odd sizes, several heads, a mask."""
    from tqdit.plugins.multi_region_attention import launch as attention
    from tqdit.plugins.multi_region_attention.reference import multi_region_attention
    from tqdit.plugins.multi_region_integer_attention import launch as integer_attention
    from tqdit.plugins.multi_region_integer_attention.reference import INT8, multi_region_integer_attention
    from tqdit.plugins.multi_region_numerator.reference import multi_region_numerator
    from tqdit.plugins.multi_region_numerator_attention.reference import multi_region_numerator_attention
    from tqdit.plugins.multi_region_numerator_integer_attention.reference import (
        multi_region_numerator_integer_attention,
    )
    from tqdit.plugins.multi_region_softmax import launch as softmax
    from tqdit.plugins.multi_region_softmax.reference import multi_region_softmax
    from tqdit.plugins.time_group_select import launch as select
    from tqdit.plugins.time_group_select.reference import time_group_select

    references: dict[str, Callable[..., Any]] = {
        "MultiRegionSoftmax": multi_region_softmax, "MultiRegionNumerator": multi_region_numerator,
        "MultiRegionAttention": multi_region_attention,
        "MultiRegionNumeratorAttention": multi_region_numerator_attention,
        "MultiRegionIntegerAttention": multi_region_integer_attention,
        "MultiRegionNumeratorIntegerAttention": multi_region_numerator_integer_attention,
    }  # fmt: skip
    rng, step = np.random.default_rng(0), np.float32(HIGH_STEP)
    low = np.array([1 / 127 / 8, 1 / 127 / 64], np.float32)
    timestep, boundaries = np.arange(131) * 7, np.array([100, 500])
    table = rng.random((3, 5), np.float32)
    yield Case("TimeGroupSelect", select.kernel("fp32", 2), select.launch(131, 5), (timestep, boundaries, table),
               (time_group_select(timestep, boundaries, table),))  # fmt: skip
    scores = _half(rng.normal(0, 3, (2, 3, 7, LONG)))
    for name, numerators in (("MultiRegionSoftmax", False), ("MultiRegionNumerator", True)):
        kernel = softmax.kernel("fp16", LONG, BITS, HIGH_STEP, numerators)
        found = references[name](scores.astype(np.float32), low, BITS, step)
        rounded, *reciprocals = found if numerators else (found,)
        yield Case(name, kernel, softmax.launch(kernel, 2, 3, 7, 2), (scores, low), (_half(rounded), *reciprocals))
    for name, numerators in (("MultiRegionAttention", False), ("MultiRegionNumeratorAttention", True)):
        for tokens in (SHORT, LONG):
            q, k, v = (_half(rng.normal(0, 40, (2, 2, tokens, HEAD)).round().clip(-128, 127)) for _ in range(3))
            mask, scale = rng.normal(0, 1, (2, 1, 1, tokens)).astype(np.float32), 2e-4
            wide = [each.astype(np.float32) for each in (q, k, v)]
            expected = _half(references[name](*wide, mask, low, BITS, step, scale))
            for tactic, blocks in enumerate(attention.candidates("fp16", HEAD, tokens), 1):
                kernel = attention.kernel(
                    "fp16", tokens, tokens, HEAD, BITS, HIGH_STEP, blocks, (1, 1, tokens), numerators
                )
                yield Case(
                    f"{name}, {tokens} tokens, tactic {tactic}", kernel,
                    attention.launch(kernel, 2, 2, 2, scale, 2), (q, k, v, mask, low), (expected,),
                )  # fmt: skip
    for name, numerators in (("MultiRegionIntegerAttention", False), ("MultiRegionNumeratorIntegerAttention", True)):
        for tokens in (SHORT, LONG):
            shapes = (2, 2, tokens, HEAD), (2, 2, tokens, HEAD), (2, 2, HEAD, tokens)
            codes = [rng.normal(0, 40, shape).round().clip(-128, 127).astype(np.int8) for shape in shapes]
            mask, by_image = rng.normal(0, 1, (2, 1, 1, tokens)).astype(np.float32), np.array([1, 2], np.float32)
            inputs: tuple[Array, ...] = (*codes, mask, 1e-4 * by_image, low, 4 * by_image, 8 * by_image)
            expected = references[name](*inputs, BITS, step, INT8)
            for tactic, blocks in enumerate(integer_attention.candidates(HEAD, tokens), 1):
                kernel = integer_attention.kernel(
                    "i8", tokens, tokens, HEAD, BITS, HIGH_STEP, blocks, (1, 1, tokens), numerators
                )
                yield Case(
                    f"{name}, {tokens} tokens, tactic {tactic}", kernel,
                    integer_attention.launch(kernel, 2, 2, 2, 2, 2, 2, 2), inputs, (expected,),
                )  # fmt: skip


def _half(array: Array) -> Array:
    return np.asarray(array, np.float16)


def _launch(case: Case, gpu: cuda.Device) -> str:
    """Compile, load and run one kernel; its error against the reference. Raises BackendError if it is wrong."""
    from tqdit.plugins.aot import best_capability, compile_kernel

    major, minor = map(int, gpu.capability.split("."))
    compiled, driver = compile_kernel(case.kernel, best_capability((major, minor))), cuda.driver()

    def call(name: str, *arguments: Any) -> Any:
        error, *values = getattr(driver, name)(*arguments)
        if int(error):
            raise BackendError(f"{name} failed: {getattr(error, 'name', error)}")
        return values[0] if values else None

    with cuda.on_device(gpu):
        module = call("cuModuleLoadData", compiled.ptx.encode() + b"\0")
        function = call("cuModuleGetFunction", module, compiled.name.encode())
        pool, stream = cuda.make_pool(gpu), gpu.handle.create_stream()
        host = [cuda.PinnedArray(array.shape, array.dtype) for array in (*case.inputs, *case.expected)]
        memory = [pool.allocate(array.buffer.size, stream=stream) for array in host]
        try:
            for array, pinned, buffer in zip(case.inputs, host, memory, strict=False):
                pinned.array[...] = array
                buffer.copy_from(pinned.buffer, stream=stream)
            pointers, count = [int(buffer.handle) for buffer in memory], len(case.inputs)
            values = (*pointers[:count], *map(int, case.launch.scalars), *pointers[count:])
            kinds = [ctypes.c_void_p] * len(values)
            kinds[count : count + len(case.launch.scalars)] = [ctypes.c_int] * len(case.launch.scalars)  # type: ignore[list-item]
            call("cuLaunchKernel", function, int(case.launch.programs), 1, 1, compiled.threads, 1, 1,
                 compiled.shared_bytes, int(stream.handle), (values, tuple(kinds)), 0)  # fmt: skip
            for pinned, buffer in zip(host[count:], memory[count:], strict=True):
                pinned.buffer.copy_from(buffer, stream=stream)
            stream.sync()
            found = [pinned.array.astype(np.float64) for pinned in host[count:]]
        finally:
            for buffer in (*memory, *(pinned.buffer for pinned in host)):
                buffer.close()
            stream.close()
            call("cuModuleUnload", module)
    error = max(_error(one, reference) for one, reference in zip(found, case.expected, strict=True))
    if not error <= KERNEL_LIMIT:
        raise BackendError(f"error against the reference {error:.1e}, expected at most {KERNEL_LIMIT:.0e}")
    return f"error {error:.1e}, {compiled.shared_bytes} bytes of shared memory, PTX of {compiled.capability}"


def _error(found: Array, reference: Array) -> float:
    one, two = (np.asarray(each, np.float64).ravel()[None] for each in (found, reference))
    return float(relative_errors(one, two)[0])  # type: ignore[arg-type]


def offers_cuda() -> bool:
    """Whether ONNX Runtime is installed, can be used, and has the CUDA provider."""
    try:
        return PROVIDERS["cuda"] in load_library().get_available_providers()
    except TqditError:  # which a proof of ONNX Runtime on the CPU tells
        return False


def prove_engine(source: Path, backend: str, device: int | None = None, provider: str | None = None) -> Iterator[Check]:
    """Build a file for a backend, verify it here, and compare its pictures or predictions with those of ONNX Runtime on
    the CPU.

    device: index of the GPU, for what runs on one. provider: of ONNX Runtime; a quantized file runs in float on a GPU
    there, which is no failure.
    """
    what = backend if provider is None else f"{backend}, {provider}"
    with tempfile.TemporaryDirectory() as place:
        made: dict[str, Manifest] = {}

        layers = Path(place) / "layers.txt"

        def build() -> str:
            from tqdit.engines.build.engine import build_engine

            here = BuildConfig(
                device=device if backend == "tensorrt" or provider else None, provider=provider,
                allow_fallback=provider is not None,
            )  # fmt: skip
            made[what] = build_engine(source, Path(place) / what, backend, here, layers=layers)
            if what != "onnxruntime":
                made["onnxruntime"] = build_engine(source, Path(place) / "onnxruntime", "onnxruntime")
            manifest = made[what]
            custom = "; ".join(f"{op}: {kind}" for op, kind in manifest.plugins.items())
            return "; ".join(filter(None, [manifest.audit.line if manifest.audit else "float", custom]))

        built = _checked(f"{what}: build and audit", build)
        if layers.is_file():  # it goes with the folder, but for the report
            said = layers.read_text(encoding="utf-8", errors="replace")
            detail = built.detail.replace(LAYERS_KEPT + clean(str(layers)), LAYERS_TOLD)
            built = replace(built, detail=detail, layers=said)
        yield built
        if built.outcome != "ok":
            return
        yield _checked(f"{what}: run and compare", lambda: _compare(Path(place), made, device))


def _compare(place: Path, made: dict[str, Manifest], device: int | None) -> str:
    """Golden calls here, then what both engines make of the same input. Raises a TqditError if it is wrong."""
    from tqdit.engines.run.verify import verify_engine

    results, said = [], []
    for number, (name, manifest) in enumerate(made.items()):  # what is proved, then ONNX Runtime on the CPU
        engine = open_engine(place / name, manifest, manifest.entry, device=None if name in ON_CPUS else device)
        try:
            if not number and CALLS_FILE in manifest.files:
                verdict = verify_engine(place / name, manifest, engine)
                verdict.check(name)
                said.append(f"golden calls: error {verdict.found.mean():.1e}, at most {verdict.limit:.1e}")
            results.append(_sampled(place / name, manifest, engine))
            if not number and hasattr(engine, "captures"):
                said.append("CUDA graphs" if engine.captures else "no CUDA graph could be captured")
        finally:
            engine.close()
    if len(results) == 1:
        return "; ".join(said)
    error = _error(*results)
    said.append(f"difference from ONNX Runtime {error:.1e}")
    if not error <= PICTURE_LIMIT:
        raise BackendError(f"{'; '.join(said)}, expected at most {PICTURE_LIMIT}")
    return "; ".join(said)


def _sampled(folder: Path, manifest: Manifest, engine: Any) -> Array:
    """States after a few steps of guided chains of two classes; of other models the predictions of the golden calls."""
    card = manifest.card
    if card.signature.label is not None:
        return Sampler(card, engine, batch=2).sample_latents([0, 1], seed=0, steps=STEPS)
    if CALLS_FILE not in manifest.files:
        raise BackendError("takes no classes and holds no golden calls, so there is nothing to compare")
    calls, rows = GoldenCalls.of(read_npz(folder / CALLS_FILE)), manifest.card.rows_per_image
    found = []
    for call in range(len(calls)):
        repeated = {name: np.repeat(array[call : call + 1], rows, axis=0) for name, array in calls.inputs.items()}
        found.append(engine(repeated)[0].copy())
    return np.stack(found)


def _checked(what: str, step: Callable[[], str]) -> Check:
    """The outcome of a step; any error of ours or of CUDA is its detail."""
    try:
        return Check(what, "ok", clean(step()))
    except (TqditError, OSError, RuntimeError) as error:
        return Check(what, "failed", clean(first_line(error, 600)))
