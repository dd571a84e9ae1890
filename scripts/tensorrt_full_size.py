#!/usr/bin/env python3
"""Build DiT-XL/2 (random weights, a W8A8 table of ten groups) with TensorRT-RTX and print what each build took.

    scripts/tensorrt_full_size.py [FOLDER]      # about ten minutes on 2 cores, 10 GB of disk; no GPU

Seconds include the passes before the compiler. Memory is the peak of the process that runs the passes and, beside it,
of the compiler's process.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCKS = 28
ROOT = Path(__file__).parent.parent
BUILDS = [  # attention of the file, precision, float type, targets
    ("simulated", "int8", "fp16", ("8.9",)),
    ("simulated", "int8", "fp16", ("8.0", "8.6", "8.9", "12.0")),
    ("integer", "int8", "fp16", ("8.9",)),
    ("float", "int8", "fp16", ("8.9",)),
    ("float", "fp8", "fp16", ("8.9",)),
    ("float", "fp16", "fp16", ("8.9",)),
    ("none", "fp32", "fp32", ("8.9",)),
]
BUILD = """
import json, resource, sys, threading, time
from pathlib import Path
from tqdit.engines.build.engine import build_engine
from tqdit.engines.config import BuildConfig
source, output, precision, float_type, *targets = sys.argv[1:]
started, compiler_peak, stop = time.perf_counter(), [0], threading.Event()

def watch():  # not by rusage: a child's begins with what its parent had
    while not stop.wait(0.05):
        for pid in Path("/proc/self/task").glob("*/children"):
            for child in pid.read_text().split():
                try:
                    status = Path(f"/proc/{child}/status").read_text()
                    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
                    compiler_peak[0] = max(compiler_peak[0], peak)
                except (OSError, IndexError):
                    pass

threading.Thread(target=watch, daemon=True).start()
config = BuildConfig(precision=precision, float_type=float_type, targets=tuple(targets))
manifest = build_engine(Path(source), Path(output), "tensorrt-rtx", config)
stop.set()
peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, compiler_peak[0] / 1e9]
print(json.dumps({
    "seconds": round(time.perf_counter() - started, 1), "peak_gb": [round(peak, 1) for peak in peaks],
    "plan_mb": round(manifest.files["engine.plan"].size_bytes / 1e6), "library": manifest.versions["tensorrt_rtx"],
    "audit": manifest.audit and manifest.audit.line,
}))
"""


def main(folder: Path) -> None:
    print(f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}", file=sys.stderr)
    for attention, precision, float_type, targets in BUILDS:
        source = folder / attention / "model.onnx"
        if not source.is_file():
            source.parent.mkdir(parents=True, exist_ok=True)
            script = str(ROOT / "tests" / "exporter" / "full_size.py")
            export = [sys.executable, script, str(source.parent), str(BLOCKS), attention]
            subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
        output = str(folder / "model.engine")
        command = [sys.executable, "-c", BUILD, str(source), output, precision, float_type, *targets]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        row = {
            "attention": attention,
            "precision": precision,
            "float": float_type,
            "targets": ",".join(targets),
            **found,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name))
