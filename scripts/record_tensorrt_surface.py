#!/usr/bin/env python3
"""Record which attributes TensorRT's Python bindings have, from a wheel of the bindings alone.

    pip download --no-deps -d wheels 'tensorrt-cu12-bindings==10.*'
    scripts/record_tensorrt_surface.py wheels/tensorrt_cu12_bindings-10....whl tests/data/tensorrt_surfaces/10.16.json

The libraries that the bindings load are not needed to look at their classes: empty ones stand in (needs gcc).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CLASSES = [
    "Builder", "BuilderFlag", "DataType", "EngineInspector", "ExecutionContextAllocationStrategy", "IBuilderConfig",
    "ICudaEngine", "IExecutionContext", "IHostMemory", "ILayer", "ILogger", "INetworkDefinition",
    "IOptimizationProfile", "IProgressMonitor", "ISerializationConfig", "ITimingCache", "LayerInformationFormat",
    "LayerType", "Logger", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser", "OnnxParserFlag",
    "OnnxParserRefitter", "ProfilingVerbosity", "Refitter", "Runtime", "SerializationFlag", "TensorIOMode",
]  # fmt: skip
ENTRY_POINTS = [
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
]  # fmt: skip
LIBRARIES = ["libnvinfer", "libnvinfer_plugin", "libnvonnxparser"]
LOOK = """
import json, sys, tensorrt_bindings as trt
def public(thing): return sorted(name for name in dir(thing) if not name.startswith("_"))
classes = {name: public(getattr(trt, name)) for name in sys.argv[1:]}
print(json.dumps({"version": trt.__version__, "module": public(trt), "classes": classes}))
"""


def main(wheel: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        source = folder / "stub.c"
        source.write_text("\n".join(f"void *{entry}(void) {{ return 0; }}" for entry in ENTRY_POINTS))
        major = wheel.name.split("-")[1].split(".")[0]
        for library in LIBRARIES:
            file = f"{library}.so.{major}"
            subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{file}", source, "-o", folder / file], check=True)
        environment = os.environ | {"LD_LIBRARY_PATH": name, "PYTHONPATH": name}
        command = [sys.executable, "-c", LOOK, *CLASSES]
        found = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found["classes"].items()]
    target.write_text(
        f'{{"version": {json.dumps(found["version"])},\n"module": {json.dumps(found["module"])},\n"classes": {{\n'
        + ",\n".join(lines)
        + "\n}}\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
