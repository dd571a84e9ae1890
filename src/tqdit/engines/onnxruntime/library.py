"""Getting hold of ONNX Runtime, which comes in two distributions that overwrite each other's files."""

from __future__ import annotations

from importlib import metadata
from types import ModuleType

from tqdit.errors import BackendError
from tqdit.extras import need

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")


def load_library() -> ModuleType:
    """The `onnxruntime` module; refuses an environment that holds both of its distributions."""
    both = [name for name in DISTRIBUTIONS if _installed(name)]
    if len(both) > 1:
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files. Run: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'tqdit[onnxruntime]' for CPUs or "
            "pip install 'tqdit[onnxruntime-gpu]'"
        )
    return need("onnxruntime", "onnxruntime", "this backend")


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
