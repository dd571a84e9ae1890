"""MultiRegionSoftmax in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def multi_region_softmax(scores: Float32, low_scale: Float32, bits: int, high_scale: float) -> Float32:
    """scores (B, H, N, M), low_scale (B,) or (1,) -> quantized probabilities (B, H, N, M), all float32.

    q = 2^(bits-1). Where round(p / s1) <= q - 1 the value is s1 round(p / s1), elsewhere s2 min(round(p / s2), q - 1);
    s1 is the row's low scale, s2 the high scale. Rounding is half to even.
    """
    exponent = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return in_two_regions(exponent / exponent.sum(axis=-1, keepdims=True), low_scale, bits, high_scale)


def in_two_regions(p: Float32, low_scale: Float32, bits: int, high_scale: float) -> Float32:
    top = np.float32(2 ** (bits - 1) - 1)
    s1, s2 = low_scale.reshape(-1, 1, 1, 1), np.float32(high_scale)
    low = np.round(p / s1)
    quantized: Float32 = np.where(low <= top, low * s1, np.minimum(np.round(p / s2), top) * s2)
    return quantized
