"""The quantizers, as functions of tensors: simulated in float32, rounding half to even.

k bits, q = 2^(k-1). Steps and zero points broadcast against x. Each function returns dequantized values of x's shape.
Sources: TQ-DiT eq. 5 and section III-C, read as docs/scale-table.md says.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The minimum of tanh-GELU, which DiT uses: the range of the negative region is the same for every layer.
GELU_MINIMUM = -0.170041


def half_range(bits: int) -> int:
    """q = 2^(k-1)."""
    return 1 << (bits - 1)


def symmetric_codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """c = clip(round(x / s), -q, q - 1), as float."""
    q = half_range(bits)
    return (x / scale).round_().clamp_(-q, q - 1)  # in place: operands of a search are large


def symmetric(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """s c."""
    return symmetric_codes(x, scale, bits).mul_(scale)


def asymmetric(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """s (clip(round(x / s) + o, 0, 2^k - 1) - o), eq. 5."""
    codes = (x / scale).round_().add_(zero_point).clamp_(0, (1 << bits) - 1)
    return codes.sub_(zero_point).mul_(scale)


def softmax_regions(p: Tensor, low_step: Tensor, high_step: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The two disjoint regions of probabilities p in 0..1; their sum is the quantized value.

    low = s1 round(p / s1) where that code is at most q - 1 and 0 elsewhere; high = s2 clip(round(p / s2), 0, q - 1)
    elsewhere and 0 there.
    """
    top = half_range(bits) - 1
    low_codes = torch.round(p / low_step)
    is_low = low_codes <= top
    zero = torch.zeros((), dtype=p.dtype, device=p.device)
    low = torch.where(is_low, low_codes * low_step, zero)
    high = torch.where(is_low, zero, torch.clamp(torch.round(p / high_step), 0, top) * high_step)
    return low, high


def gelu_regions(x: Tensor, negative_step: Tensor, positive_step: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The two disjoint regions after GELU; their sum is the quantized value.

    Both are on the symmetric grid: min(x, 0) takes only codes -q..0 of it, max(x, 0) only 0..q-1.
    """
    return symmetric(x.clamp(max=0), negative_step, bits), symmetric(x.clamp(min=0), positive_step, bits)


def symmetric_step(largest: Tensor, bits: int) -> Tensor:
    """The range-based step: the largest magnitude is clipped by half a step, as is every rounding error."""
    return _positive(largest / (half_range(bits) - 0.5))


def asymmetric_parameters(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(step, zero point) of a range [low, high] that is first widened to hold 0, which must stay exact."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = _positive((high - low) / ((1 << bits) - 1))
    return step, torch.clamp(torch.round(-low / step), 0, (1 << bits) - 1)


def softmax_high_step(bits: int, whole_range: bool = True) -> float:
    """s2 = 1 / (q - 1), which represents 1 exactly, or the paper's 1 / q, which clips its top code."""
    q = half_range(bits)
    return 1 / (q - 1) if whole_range else 1 / q


def softmax_low_steps(bits: int, high_step: float) -> Tensor:
    """Candidates s1 = 2^-i s2, i = 0..k-1, float32 (k,). Beyond k - 1 the quantizer stops being monotone."""
    return torch.tensor([high_step * 2.0**-i for i in range(bits)], dtype=torch.float32)


def _positive(step: Tensor) -> Tensor:
    """A tensor that is all zeros gets step 1: its codes are zero with any."""
    return torch.where(step > 0, step, torch.ones_like(step)).clamp(min=torch.finfo(torch.float32).tiny)
