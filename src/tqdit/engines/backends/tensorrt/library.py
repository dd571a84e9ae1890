"""The differences between TensorRT-RTX and TensorRT, and between 10.x and 11.x of the latter. Nothing else knows them.

| | TensorRT-RTX 1.x | TensorRT 10.x | 11.x |
|---|---|---|---|
| builder and parser without a GPU | yes | no | no |
| one engine for several compute capabilities | yes | no | no |
| strongly typed networks | by a flag | by a flag | always; the flag is kept and ignored |
| plugins | none: the parser aborts on a registered one | yes | yes |
| timing cache, optimisation level | kept without effect | yes | yes |
| weights of an engine replaced, or left in the host's memory | by flags | by flags | by flags |
| engine runs on another release | never | the same major version, if built so | same |
| proof of a layer's precision | layers in the detailed build log | engine inspector, `Layers` | same |
| CUDA graphs | its own, chosen by runtime configuration | captured by us | captured by us |

Sources: NVIDIA's migration guides and the attributes of the 10.16 and 11.4 bindings, which the tests hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdit.engines.backends.tensorrt.layers import HEADING, Layer, from_inspector, from_log
from tqdit.engines.bundle import release_numbers
from tqdit.engines.config import BuildConfig
from tqdit.errors import BackendError, OutputError, UsageError
from tqdit.extras import need
from tqdit.files import whole_file

RTX_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"  # read by Polygraphy once, when it is imported
FEATURES = {  # field of BuildConfig -> what the library must have
    "refit": ("BuilderFlag.REFIT", "Refitter", "OnnxParserRefitter"),
    "weight_streaming": ("BuilderFlag.WEIGHT_STREAMING",),
}


class Log:
    """A logger that keeps the errors and, of a detailed build, the lists of layers."""

    def __init__(self, trt: ModuleType) -> None:
        self.errors: list[str] = []
        self.listings: list[str] = []
        log = self
        serious = (trt.Logger.ERROR, trt.Logger.INTERNAL_ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in serious:
                    log.errors.append(message)
                elif message.startswith(HEADING):
                    log.listings.append(message)

        self.logger = Logger()

    @property
    def reason(self) -> str:
        """The first error in brackets, '' if there is none."""
        return f" ({' '.join(self.errors[0].split())})" if self.errors else ""


class RuntimeCache:
    """The kernels that TensorRT-RTX compiled for one engine and GPU, in a file; without it every process compiles them.

    The library refuses content of another release, driver or GPU by itself. A file that cannot be read or written
    counts as none.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._stored = file, b""
        self._cache: Any = None  # the library's

    def join(self, config: Any) -> None:
        """Let the contexts of a runtime configuration use it."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with suppress(OSError):
                self._stored = self._file.read_bytes()
            if self._stored and not self._cache.deserialize(self._stored):
                self._stored = b""
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what has been added since it was read."""
        content = b"" if self._cache is None else bytes(memoryview(self._cache.serialize()))
        if content and content != self._stored:
            with suppress(OSError, OutputError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(self._file) as temporary:
                    temporary.write_bytes(content)
                self._stored = content


@dataclass(frozen=True)
class Library:
    """One of the two."""

    backend: str  # the backend's name, and the extra that installs it
    module: str
    title: str
    cross_compiles: bool  # for any compute capabilities, without a GPU; otherwise for the GPU that is here
    takes_plugins: bool
    is_rtx: bool
    options: frozenset[str]  # fields of BuildConfig

    @property
    def installed(self) -> bool:
        return util.find_spec(self.module) is not None

    def load(self, why: str) -> ModuleType:
        """Its Python module; MissingLibraryError with the pip command if it is not installed."""
        return need(self.module, self.backend, why)

    def choose_in_polygraphy(self) -> None:
        """Point Polygraphy at this library. Must come before anything imports Polygraphy in this process."""
        os.environ[RTX_SWITCH] = "1" if self.is_rtx else "0"

    def config_loader(self, **settings: Any) -> Any:
        """Polygraphy's loader for the builder's configuration."""
        if self.is_rtx:
            from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

            return CreateConfigRTX(**settings)
        from polygraphy.backend.trt import CreateConfig

        settings.pop("compute_capabilities", None)
        return CreateConfig(tf32=True, **settings)  # float32 islands are small; TF32 is what RTX does by default

    def check_offers(self, trt: ModuleType, config: BuildConfig) -> None:
        """Refuse what this release has no setting for."""
        for field, names in FEATURES.items():
            missing = [name for name in names if not _has(trt, name)]
            if getattr(config, field) and missing:
                raise UsageError(
                    f"--{field.replace('_', '-')}: {self.title} {trt.__version__} has no {missing[0]}. Leave it "
                    "out, or install another release."
                )

    def refit(self, trt: ModuleType, plan: bytes, source: str, changed: Collection[str]) -> Any:
        """The plan with the weights of an ONNX file, as the library serializes it again. Takes the GPU.

        changed: the weights that differ from those that the plan holds, by the names of the file. Raises BackendError
        if one of them is not among those that the library can replace: its value is part of the compiled code then.
        """
        log = Log(trt)
        runtime = trt.Runtime(log.logger)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"{self.title} {trt.__version__} cannot open it{log.reason}")
        refitter = trt.Refitter(engine, log.logger)
        fixed = sorted(set(changed) - set(refitter.get_all_weights()))
        if fixed:
            shown = ", ".join(fixed[:3]) + (", ..." if len(fixed) > 3 else "")
            raise BackendError(f"{len(fixed)} value(s) that differ are part of its compiled code ({shown})")
        parser = trt.OnnxParserRefitter(refitter, log.logger)
        if not parser.refit_from_file(source) or refitter.get_missing_weights() or not refitter.refit_cuda_engine():
            raise BackendError(f"{self.title} {trt.__version__} refused the weights{log.reason}")
        config = engine.create_serialization_config()
        config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
        if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):  # older releases keep a plan refittable unasked
            config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
        return engine.serialize_with_config(config)

    def targets(self, trt: ModuleType) -> tuple[str, ...]:
        """Compute capabilities that an engine can be made for, such as ('8.0', '12.0')."""
        if not self.cross_compiles:
            return ()
        numbers = [name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
        return tuple(f"{number[:-1]}.{number[-1]}" for number in sorted(numbers, key=int))

    def report(self, trt: ModuleType, plan: Any, log: Log) -> str:
        """What was compiled: the list in the build log, or the JSON of the plan's inspector, which takes a GPU."""
        if self.is_rtx:
            return (log.listings or [""])[-1]
        runtime = trt.Runtime(log.logger)
        if hasattr(runtime, "engine_host_code_allowed"):
            runtime.engine_host_code_allowed = True  # built a moment ago by this process
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"{self.title} {trt.__version__} cannot open the plan that it has just built.")
        return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))

    def layers(self, report: str) -> tuple[Layer, ...]:
        """The layers of a report."""
        return from_log([report]) if self.is_rtx else from_inspector(json.loads(report))

    def runs_engine_of(self, built_by: str, installed: str, version_compatible: bool) -> bool:
        """Whether release `installed` may open an engine of release `built_by`."""
        if version_compatible and not self.is_rtx:
            built, here = release_numbers(built_by), release_numbers(installed)
            return built[0] == here[0] and built <= here
        return release_numbers(built_by)[:3] == release_numbers(installed)[:3]

    def create_context(self, trt: ModuleType, engine: Any, cache: RuntimeCache | None = None) -> Any:
        """An execution context whose scratch memory we provide. RTX also captures and replays CUDA graphs by itself,
        and keeps in `cache` the kernels that it compiles at run time.
        """
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.is_rtx:
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if cache is not None:
            cache.join(config)
        return engine.create_execution_context(config)


def _has(trt: ModuleType, name: str) -> bool:
    """Whether the module has an attribute such as 'BuilderFlag.REFIT'."""
    found: Any = trt
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not None


TENSORRT_RTX = Library(
    backend="tensorrt-rtx",
    module="tensorrt_rtx",
    title="TensorRT-RTX",
    cross_compiles=True,
    takes_plugins=False,
    is_rtx=True,
    options=frozenset({"batch", "targets", "workspace_bytes", "plugins", "refit", "weight_streaming"}),
)
TENSORRT = Library(
    backend="tensorrt",
    module="tensorrt",
    title="TensorRT",
    cross_compiles=False,
    takes_plugins=True,
    is_rtx=False,
    options=frozenset({"batch", "workspace_bytes", "timing_cache", "optimization_level", "plugins"})
    | {"version_compatible", "lean_runtime", "device", "refit", "weight_streaming"},
)
LIBRARIES = {library.backend: library for library in (TENSORRT_RTX, TENSORRT)}
