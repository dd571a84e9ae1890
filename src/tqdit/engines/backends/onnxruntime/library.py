"""Getting hold of ONNX Runtime, which comes in two distributions that overwrite each other's files."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdit.errors import BackendError, first_line
from tqdit.extras import install, need

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")


def load_library() -> ModuleType:
    """The `onnxruntime` module; refuses an environment that holds both of its distributions."""
    if all(any(metadata.distributions(name=name)) for name in DISTRIBUTIONS):
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files. Run: "
            f"pip uninstall -y onnxruntime onnxruntime-gpu, then {install('onnxruntime')} for CPUs or "
            f"{install('onnxruntime-gpu')}"
        )
    # Its telemetry would write to the user's home, and a fork of this process would wait for its thread when it ends.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return need("onnxruntime", "onnxruntime", "this backend")


def session_options(ort: ModuleType) -> tuple[Any, dict[str, Any]]:
    """(options, further arguments) of every session, when building and when running; the caller adds the providers.

    MatMulAddFusion turns a quantized MatMul + Add into a form that static Q/DQ graphs of 1.31 fail to load or compute
    wrongly. Products with int8 weights alone become MatMulNBits, whose default (accuracy level 4) would also round
    their inputs to int8, which the scale table does not contain; level 1 computes them in float32.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options, {"disabled_optimizers": ["MatMulAddFusion"]}


def open_session(ort: ModuleType, file: Path, options: Any, **settings: Any) -> Any:
    """A session with a file. Raises BackendError if ONNX Runtime refuses it."""
    try:
        return ort.InferenceSession(file, options, **settings)
    except Exception as error:  # it raises a class of its own for each status code
        raise BackendError(f"{file}: ONNX Runtime {ort.__version__} cannot open it ({first_line(error)}).") from error
