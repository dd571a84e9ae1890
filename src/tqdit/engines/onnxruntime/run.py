"""Run an optimised graph."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.engines.bundle import Manifest
from tqdit.engines.onnxruntime.library import load_library, session_options
from tqdit.errors import BackendError


class OrtEngine:
    """One session. `threads` None leaves the choice to ONNX Runtime (one per physical core)."""

    def __init__(self, file: Path, threads: int | None) -> None:
        ort = load_library()
        options, settings = session_options(ort)
        # All that is to become integer was fused when it was built. With this off, constants are folded through the
        # dequantization that is left: weights that are quantized alone become float32 here, once.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session: Any = ort.InferenceSession(file, options, **settings)
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code
            reason = str(error).strip().splitlines()[0]
            raise BackendError(f"{file}: ONNX Runtime {ort.__version__} cannot load it ({reason}).") from error
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._output = self._session.get_outputs()[0].name

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        fed = {name: value for name, value in inputs.items() if name in self._inputs}
        result: NDArray[np.float32] = self._session.run([self._output], fed)[0]
        return result

    def close(self) -> None:
        self._session = None


def load(folder: Path, manifest: Manifest, file: str, threads: int | None) -> OrtEngine:
    """Open one file of a bundle; refuses one that was built for another machine or by a newer ONNX Runtime."""
    ort = load_library()
    machine = manifest.target.get("machine")
    if machine != platform.machine():
        raise BackendError(
            f"{folder}: built for {machine}, this machine is {platform.machine()}. Build the engine here."
        )
    built_by = manifest.versions.get("onnxruntime", "0")
    if _version(ort.__version__) < _version(built_by):
        raise BackendError(
            f"{folder}: built by ONNX Runtime {built_by}, installed is {ort.__version__}. Build the engine again, or "
            f"run: pip install 'onnxruntime>={built_by}'"
        )
    return OrtEngine(folder / file, threads)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
