"""The ops as TensorRT plugins.

A plugin is compiled into the plan as PTX ("ahead of time"), so an engine needs neither Python nor a library of ours
where it runs. TensorRT 10.9 and newer; TensorRT-RTX has no plugins and gets the function bodies.
"""

from __future__ import annotations

import importlib
import importlib.util

from tqdit.extras import missing
from tqdit.plugins import aot

NAMES = (
    "MultiRegionAttention", "MultiRegionIntegerAttention", "MultiRegionNumerator", "MultiRegionNumeratorAttention",
    "MultiRegionNumeratorIntegerAttention", "MultiRegionSoftmax", "TimeGroupSelect",
)  # fmt: skip


def register_plugins(capability: tuple[int, int] | None = None) -> tuple[str, ...]:
    """Register the plugins with TensorRT, once per process, and return their names.

    capability: of the GPU that the engine is for; None compiles for 8.0, which later ones run too. Returns nothing if
    `why_unavailable` says why. Call it before the file is parsed.
    """
    if why_unavailable() is not None:
        return ()
    definitions = importlib.import_module("tqdit.plugins.tensorrt_definitions")
    definitions.define(aot.best_capability(capability))
    return NAMES


def why_unavailable() -> str | None:
    """Why plugins cannot be used here, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return str(missing("triton", "triton", "compiling the plugins"))
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        return f"TensorRT cannot be imported ({error})"
    version = getattr(trt, "__version__", "of unknown version")
    try:
        plugin = importlib.import_module("tensorrt.plugin")
    except ImportError:
        return f"TensorRT {version} has no Python plugins (TensorRT-RTX has none at all)"
    if not hasattr(plugin, "KernelLaunchParams"):
        return f"TensorRT {version} has no ahead-of-time plugins"
    return None
