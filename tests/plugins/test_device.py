"""What only a CUDA GPU can show. (The tests of test_kernels.py run on it too, where there is one.)"""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kernel_device import regions
from tqdit.plugins import aot
from tqdit.plugins.multi_region_attention import launch as attention
from tqdit.plugins.multi_region_integer_attention import launch as integer_attention
from tqdit.plugins.multi_region_softmax import launch as softmax

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of CUfunction_attribute


def launch_ptx(compiled, launch, inputs, output):
    """As TensorRT does: pointers of the inputs, integers, pointer of the output, and nothing more."""
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name, *arguments):
        assert getattr(driver, name)(*arguments) == 0, name

    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuModuleLoadData", ctypes.byref(module), compiled.ptx.encode() + b"\0")
    call("cuModuleGetFunction", ctypes.byref(function), module, compiled.name.encode())
    call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE_BYTES, compiled.shared_bytes)
    values = [ctypes.c_void_p(each.data_ptr()) for each in inputs]
    values += [ctypes.c_int(each) for each in launch.scalars] + [ctypes.c_void_p(output.data_ptr())]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(each) for each in values))
    torch.cuda.synchronize()
    call("cuLaunchKernel", function, launch.programs, 1, 1, compiled.threads, 1, 1, compiled.shared_bytes,
         ctypes.c_void_p(), pointers, ctypes.c_void_p())  # fmt: skip
    torch.cuda.synchronize()
    call("cuModuleUnload", module)
    return output.float().cpu().numpy()


@pytest.mark.parametrize("tokens", [256, 1000])
@pytest.mark.parametrize("portable", [True, False])
def test_the_compiled_attention_runs_with_its_visible_parameters(tokens, portable):
    capability = aot.PORTABLE if portable else aot.best_capability(torch.cuda.get_device_capability())
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        (torch.randn(2, 3, tokens, 72, device="cuda", generator=generator) * 40).round().clamp(-128, 127).half()
        for _ in range(3)
    )
    low_scale, scale = torch.tensor([1 / 127 / 8, 1 / 127 / 64], device="cuda"), 2e-4
    mask = torch.randn(2, 1, 1, tokens, device="cuda", generator=generator)
    p, off = regions(
        (q.double() @ k.double().mT * scale + mask).cpu().numpy(), low_scale.cpu().numpy(), 8, np.float32(1 / 127)
    )
    values = v.double().cpu().numpy()
    bound = 2**-10 * (p @ np.abs(values)) + 1.001 * (off @ np.abs(values)) + 1e-6
    for blocks in attention.candidates("fp16", 72, tokens):
        kernel = attention.kernel("fp16", tokens, tokens, 72, 8, 1 / 127, blocks, mask.shape[1:])
        launch = attention.launch(kernel, 2, 3, 2, scale, 2)
        inputs = (q, k, v, mask, low_scale)
        out = launch_ptx(aot.compile_kernel(kernel, capability), launch, inputs, torch.full_like(q, np.nan))
        assert (np.abs(out - p @ values) <= bound).all()


@pytest.mark.parametrize("tokens", [256, 1000])
@pytest.mark.parametrize("portable", [True, False])
def test_the_compiled_integer_attention_runs_with_its_visible_parameters(tokens, portable):
    capability = aot.PORTABLE if portable else aot.best_capability(torch.cuda.get_device_capability())
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (2, 3, tokens, 72), (2, 3, tokens, 72), (2, 3, 72, tokens)
    q, k, v = (
        (torch.randn(shape, device="cuda", generator=generator) * 40).round().clamp(-128, 127).to(torch.int8)
        for shape in shapes
    )
    numbers = [torch.tensor(each, device="cuda") for each in ([2e-4], [1 / 127 / 8, 1 / 127 / 50], [2.0, 5.0], [3.0])]
    mask = torch.randn(2, 1, 1, tokens, device="cuda", generator=generator)
    scores = (q.double() @ k.double().mT * 2e-4 + mask).cpu().numpy()
    p, off = regions(scores, numbers[1].cpu().numpy(), 8, np.float32(1 / 127))
    values, scale = v.double().mT.cpu().numpy(), np.array([2.0, 5.0]).reshape(2, 1, 1, 1)
    expected = np.clip(p @ values * scale + 3, -128, 127)
    bound = 0.5 + 2e-6 * (p @ np.abs(values) * scale + 3) + 1.001 * (off @ np.abs(values)) * scale + 1e-5
    for blocks in integer_attention.candidates(72, tokens):
        kernel = integer_attention.kernel("i8", tokens, tokens, 72, 8, 1 / 127, blocks, mask.shape[1:])
        launch = integer_attention.launch(kernel, 2, 3, 2, 1, 2, 2, 1)
        out = launch_ptx(aot.compile_kernel(kernel, capability), launch, (q, k, v, mask, *numbers), torch.empty_like(q))
        assert (np.abs(out - expected) <= bound).all()


def test_the_compiled_softmax_runs_with_its_visible_parameters():
    scores = torch.randn(3, 2, 50, 77, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) * 3
    low_scale = torch.tensor([1 / 127 / 8], device="cuda")
    kernel = softmax.kernel("fp32", 77, 8, 1 / 127)
    launch = softmax.launch(kernel, 3, 2, 50, 1)
    compiled = aot.compile_kernel(kernel, aot.best_capability(torch.cuda.get_device_capability()))
    out = launch_ptx(compiled, launch, (scores, low_scale), torch.full_like(scores, np.nan))
    expected, off = regions(scores.cpu().numpy(), low_scale.cpu().numpy(), 8, np.float32(1 / 127))
    assert (np.abs(out - expected) <= 2e-6 * expected + 1.001 * off).all()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit")
    program = Path(__file__).parent / "every_kernel.py"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
