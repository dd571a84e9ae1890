"""What a Triton kernel needs to be launched or compiled, as a value; no Triton is imported here.

Each op's `launch.py` turns types and static sizes into a `Kernel` and all sizes into a `Launch`. The arithmetic of a
launch uses +, * and // alone, so that it takes TensorRT's symbolic sizes as well as ints.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

Size = Any  # an int, or an integer expression of a builder
FLOATS = ("fp32", "fp16", "bf16")
MAX_TOKENS = 1 << 20  # of queries and of keys; their offsets in a head are 32-bit integers


@dataclass(frozen=True)
class Kernel:
    """One specialisation of a kernel."""

    module: str
    function: str
    parameters: tuple[tuple[str, str], ...]  # name and Triton type of what a launcher passes, in order
    constants: tuple[tuple[str, int | float | bool | str], ...]
    num_warps: int = 4
    num_stages: int = 2

    def load(self) -> Any:
        """The function: compiled if there is a GPU, interpreted under TRITON_INTERPRET=1."""
        return getattr(importlib.import_module(self.module), self.function)


@dataclass(frozen=True)
class Launch:
    """Programs in a grid of one dimension, and the integers between the pointers of inputs and output."""

    programs: Size
    scalars: tuple[Size, ...]


def run(kernel: Kernel, launch: Launch, inputs: tuple[Any, ...], output: Any) -> Any:
    """Launch on contiguous tensors of this device or of the interpreter; returns `output`, a tensor or a tuple."""
    outputs = output if isinstance(output, tuple) else (output,)
    kernel.load()[(launch.programs,)](
        *inputs, *launch.scalars, *outputs, **dict(kernel.constants),
        num_warps=kernel.num_warps, num_stages=kernel.num_stages,
    )  # fmt: skip
    return output


def ceil_div(size: Size, block: int) -> Size:
    return (size + (block - 1)) // block


def next_power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def top_code(bits: int) -> int:
    """q - 1 = 2^(bits-1) - 1."""
    return (1 << (bits - 1)) - 1
