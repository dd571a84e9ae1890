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


@pytest.mark.parametrize("file", ["sampling/test_noise.py", "sampling/test_chains.py", "evaluate/test_statistics.py"])
def test_a_test_file_without_torch_runs_without_torch(file):
    tests = Path(__file__).parent
    command = [sys.executable, "-c", PROGRAM, str(tests / file), "-p", "no:cacheprovider", "-n", "0"]
    done = subprocess.run(command, cwd=tests.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
