"""Where a calibration computes. The same arithmetic everywhere: float32 without shortcuts, sums in a fixed order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from tqdit.errors import UsageError


def choose_device(wanted: str) -> torch.device:
    """`auto`: a GPU that PyTorch can use, else the CPU. Raises UsageError if `cuda` is requested and absent."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--device cuda: PyTorch {torch.__version__} sees no CUDA GPU here. Install a PyTorch for CUDA and a "
            "driver, or pass --device cpu."
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """On a GPU: no TF32, and kernels that give the same sums in each run. The settings before come back at the end."""
    if device.type == "cpu":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS sums in a fixed order only with this
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def peak_device_bytes(device: torch.device) -> int:
    """Most memory that tensors took on a GPU so far; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
