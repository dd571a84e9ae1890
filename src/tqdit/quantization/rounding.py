"""The integer grid that every scheme builds on: k bits, q = 2^(k-1), rounding half to even.

torch itself is not imported: methods of the tensors are enough, and reading a scale table needs NumPy alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # x / a denormal is infinite where denormals are flushed to zero


def code_range(bits: int) -> tuple[int, int]:
    """(-q, q - 1)."""
    q = 1 << (bits - 1)
    return -q, q - 1


def codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """c = clip(round(x / s), -q, q - 1), as float."""
    return (x / scale).round_().clamp_(*code_range(bits))  # in place: operands of a search are large


def rounded(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """s clip(round(x / s), -q, q - 1)."""
    return codes(x, scale, bits).mul_(scale)


def range_scale(largest: Tensor, bits: int) -> Tensor:
    """The range-based scale: the largest magnitude is clipped by half a scale, as is every rounding error."""
    return usable(largest / ((1 << (bits - 1)) - 0.5))


def usable(scale: Tensor) -> Tensor:
    """A scale of 0 becomes 1: the codes of a tensor of zeros are zero with any scale."""
    return scale.where(scale > 0, scale.new_ones(())).clamp(min=SMALLEST_SCALE)
