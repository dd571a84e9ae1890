"""Run an optimised graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.engines import cuda
from tqdit.engines.backends.onnxruntime.library import load_library, open_session, session_options
from tqdit.engines.backends.onnxruntime.providers import (
    CPU,
    NAMES,
    check_got,
    check_offered,
    refuse_device,
    settings_of,
)
from tqdit.engines.bundle import Manifest, check_machine, check_not_older
from tqdit.errors import BackendError, UsageError, first_line


class OrtEngine:
    """One session. `threads` None leaves the choice to ONNX Runtime (one per physical core).

    Inputs are read where they lie, and the result is written where the caller will read it: nothing is copied.
    """

    def __init__(
        self, file: Path, threads: int | None, providers: list[Any] | None = None, provider: str = "cpu",
        device: int | None = None,
    ) -> None:  # fmt: skip
        ort = load_library()
        check_offered(ort, provider)
        options, settings = session_options(ort)
        # All that is to become integer was fused when it was built. With this off, constants are folded through the
        # dequantization that is left: weights that are quantized alone become float32 here, once.
        if provider != "tensorrt":  # which fuses by itself
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = open_session(ort, file, options, providers=providers or [CPU], **settings)
        check_got(self._session, provider)
        self._file = file
        self.place: str | None = None
        if provider != "cpu":
            self.place = f"{cuda.kind_of(device or 0)}, {provider}, ONNX Runtime {ort.__version__}"
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [(value.name, tuple(value.shape[1:])) for value in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        return self._run(inputs, 1)[0]

    def outputs(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], ...]:
        return self._run(inputs, len(self._outputs))

    def _run(self, inputs: Mapping[str, NDArray[Any]], count: int) -> tuple[NDArray[np.float32], ...]:
        """The first `count` outputs; what only the others need is not computed."""
        session = self._session
        if session is None:
            raise UsageError("this engine is closed. Open it again.")
        binding = session.io_binding()
        fed = [np.ascontiguousarray(inputs[name]) for name in self._inputs]
        for name, value in zip(self._inputs, fed, strict=True):
            binding.bind_cpu_input(name, value)
        made = tuple(np.empty((len(fed[0]), *shape), np.float32) for _, shape in self._outputs[:count])
        for (name, _), out in zip(self._outputs, made, strict=False):
            binding.bind_output(name, "cpu", 0, np.float32, out.shape, out.ctypes.data)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # a class of its own for each status code
            raise BackendError(f"{self._file}: ONNX Runtime failed to run it ({first_line(error)}).") from error
        return made

    def close(self) -> None:
        """Calls under way end as usual; the memory goes with the last of them."""
        self._session = None


TAKES_DEVICE = True
MODULES = ("onnxruntime",)


def load(
    folder: Path, manifest: Manifest, file: str, threads: int | None, device: int | None = None
) -> OrtEngine:  # fmt: skip
    """Open one file of a bundle; refuses one that was built for another machine or by a newer ONNX Runtime."""
    ort = load_library()
    check_machine(folder, manifest)
    check_not_older(folder, manifest, "onnxruntime", "ONNX Runtime", ort.__version__)
    provider = NAMES.get(manifest.target.get("provider", CPU))
    if provider is None:
        raise BackendError(
            f"{folder}: built for {manifest.target['provider']}, which this tqdit lacks. Build it again."
        )
    refuse_device(provider, device)
    if file != manifest.entry and provider == "tensorrt":
        provider = "cuda"  # the decoder
    settings = settings_of(provider, folder, manifest.card, manifest.batch, manifest.float_type, device)
    return OrtEngine(folder / file, threads, settings, provider, device)
