"""MultiRegionNumerator in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tqdit.plugins.multi_region_softmax.reference import in_two_regions

Float32 = NDArray[np.float32]


def multi_region_numerator(
    scores: Float32, low_scale: Float32, bits: int, high_scale: float
) -> tuple[Float32, Float32]:
    """scores (B, H, N, M), low_scale (B,) or (1,) -> quantized numerators (B, H, N, M), reciprocals (B, H, N, 1).

    e = exp(scores - largest score of the row), rounded as MultiRegionSoftmax rounds p; the second result is 1 / sum(e)
    over the row, before rounding. All float32.
    """
    exponent = np.exp(scores - scores.max(axis=-1, keepdims=True))
    reciprocals: Float32 = np.float32(1) / exponent.sum(axis=-1, keepdims=True)
    return in_two_regions(exponent, low_scale, bits, high_scale), reciprocals
