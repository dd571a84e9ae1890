"""The run side imports neither the build side nor torch nor onnx."""

import pkgutil
import subprocess
import sys

from tqdit.engines import backends, run
from tqdit.engines.backends import backend_names

RUN_SIDE = [
    f"{run.__name__}.{entry.name}" for entry in pkgutil.iter_modules(run.__path__) if entry.name != "drop_in"
] + [f"{backends.__name__}.{name.replace('-', '_')}.run" for name in backend_names()]
FORBIDDEN = """
import importlib, sys
for name in {names}:
    importlib.import_module(name)
print(*(name for name in sys.modules if name.split(".")[0] in ("torch", "onnx", "onnx_ir", "google")
        or name.startswith(("tqdit.engines.build", "tqdit.exporter", "tqdit.calibration", "tqdit.onnx_file"))
        or (name.startswith("tqdit.engines.backends.") and name.endswith(".build"))))
"""


def test_the_run_side_loads_neither_the_build_side_nor_torch_nor_onnx():
    program = FORBIDDEN.format(names=RUN_SIDE)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []
    assert len(RUN_SIDE) >= 11
