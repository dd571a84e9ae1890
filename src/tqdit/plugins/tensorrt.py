"""The ops as TensorRT plugins: which are there, and which nodes ask for them.

A plugin is compiled into the plan as PTX ("ahead of time"), so an engine needs neither Python nor a library of ours
where it runs. TensorRT 10.9 and newer; TensorRT-RTX has no plugins and gets the function bodies.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from typing import TYPE_CHECKING

from tqdit.extras import missing
from tqdit.plugins import DOMAIN, aot
from tqdit.plugins.function import PLUGIN_ATTRIBUTES

if TYPE_CHECKING:
    import onnx

NAMES = ("MultiRegionAttention", "MultiRegionSoftmax", "TimeGroupSelect")


def register_plugins(capability: tuple[int, int] | None = None) -> tuple[str, ...]:
    """Register the plugins with TensorRT, once per process, and return their names.

    capability: of the GPU that the engine is for; None asks the driver, and without one compiles for 8.0, which
    later ones run too. Returns nothing if `why_unavailable` says why. Call it before the file is parsed.
    """
    if why_unavailable() is not None:
        return ()
    definitions = importlib.import_module("tqdit.plugins.tensorrt_definitions")
    definitions.define(aot.best_capability(capability or device_capability()))
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


def mark_for_plugins(model: onnx.ModelProto, use: bool = True) -> int:
    """Give every node of ours the attributes by which TensorRT's parser finds a plugin, or take them away.

    Plugins stay registered for as long as the process lives; a file without the attributes gets its function bodies all
    the same. Do not inline the functions before. Returns the number of nodes; changes the model in place.
    """
    import onnx

    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    for node in nodes:
        kept = [each for each in node.attribute if each.name not in PLUGIN_ATTRIBUTES]
        del node.attribute[:]
        node.attribute.extend(kept)
        if use:
            node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in PLUGIN_ATTRIBUTES.items())
    return len(nodes)


def device_capability() -> tuple[int, int] | None:
    """Compute capability of the first GPU, asked from the driver; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    asked = (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device),  # COMPUTE_CAPABILITY_MAJOR
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
    )
    return None if any(asked) else (major.value, minor.value)
