"""Run an OpenVINO IR."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.engines.backends.openvino.library import compile_file, has_bfloat16, load_library, reason, release
from tqdit.engines.bundle import Manifest, check_machine, check_not_older
from tqdit.errors import BackendError, UsageError


class OpenVinoEngine:
    """One compiled model and the requests that run it, one per call under way.

    The batch is whatever the inputs have. Kernels for a new batch size are made at its first call, some tenths of a
    second for a large model, and kept. `threads` None leaves the choice to OpenVINO (one per physical core).
    """

    def __init__(self, file: Path, float_type: str, threads: int | None) -> None:
        self._file = file
        self._compiled: Any = compile_file(load_library(), file, float_type, threads)
        # by the names of the parameters; the tensors that they make have those of no-ops behind them, too
        self._inputs = [(port.node.friendly_name, port.element_type.to_dtype()) for port in self._compiled.inputs]
        self._idle: list[Any] = []  # append and pop are atomic

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        return self._run(inputs, 1)[0]

    def outputs(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], ...]:
        return self._run(inputs, len(self._compiled.outputs) if self._compiled is not None else 0)

    def _run(self, inputs: Mapping[str, NDArray[Any]], count: int) -> tuple[NDArray[np.float32], ...]:
        """Inputs are read where they lie and an output is copied once, out of the request's own buffer."""
        compiled = self._compiled
        if compiled is None:
            raise UsageError("this engine is closed. Open it again.")
        try:
            request = self._idle.pop()
        except IndexError:
            request = compiled.create_infer_request()
        fed = [np.ascontiguousarray(inputs[name], dtype) for name, dtype in self._inputs]
        try:
            request.start_async(fed, share_inputs=True)
            request.wait()
        except RuntimeError as error:  # what OpenVINO raises whatever went wrong; the request is dropped
            raise BackendError(f"{self._file}: OpenVINO failed to run it ({reason(error)}).") from error
        made = tuple(np.array(request.get_output_tensor(index).data) for index in range(count))
        if self._compiled is not None:
            self._idle.append(request)
        return made

    def close(self) -> None:
        """Calls under way end as usual; the memory goes with the last of them."""
        self._compiled = None
        self._idle.clear()


MODULES = ("openvino",)


def load(folder: Path, manifest: Manifest, file: str, threads: int | None) -> OpenVinoEngine:
    """Open one file of a bundle; refuses one for another machine, a CPU without its float type, or a newer OpenVINO."""
    ov = load_library()
    check_machine(folder, manifest)
    check_not_older(folder, manifest, "openvino", "OpenVINO", release(ov))
    if manifest.float_type == "bf16" and not has_bfloat16(ov):
        raise BackendError(f"{folder}: computes in bfloat16, which this CPU lacks. Build it with --float-type fp32.")
    return OpenVinoEngine(folder / file, manifest.float_type, threads)
