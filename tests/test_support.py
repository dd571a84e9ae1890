"""The tests' own support costs only what a test uses."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, pytest
code = pytest.main(sys.argv[1:])
print("loaded:", *(name for name in ("torch", "onnx", "onnx_ir", "triton", "safetensors.torch") if name in sys.modules))
sys.exit(code)
"""


@pytest.mark.slow
def test_test_files_without_torch_run_without_torch():
    tests = Path(__file__).parent
    files = [
        tests / name for name in ("sampling/test_noise.py", "sampling/test_chains.py", "evaluate/test_statistics.py")
    ]
    command = [sys.executable, "-c", PROGRAM, *map(str, files), "-p", "no:cacheprovider", "-n", "0", "-m", "not slow"]
    done = subprocess.run(command, cwd=tests.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
