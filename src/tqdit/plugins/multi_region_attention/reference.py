"""MultiRegionAttention in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tqdit.plugins.multi_region_softmax.reference import multi_region_softmax

Float32 = NDArray[np.float32]
LEAST_MASK = np.float32(-1e30)  # no probability is left of it, and sums with it are finite


def multi_region_attention(
    q: Float32, k: Float32, v: Float32, mask: Float32, low_scale: Float32, bits: int, high_scale: float, scale: float
) -> Float32:
    """q (B, H, N, d), k and v (B, H, M, d), mask (B, H, N, M) with any axis of length 1, low_scale (B,) or (1,) ->
    (B, H, N, d), all float32.

    MultiRegionSoftmax(scale q kᵀ + max(mask, -1e30), low_scale) v. Nothing else is rounded: q, k and v come as the
    caller quantized them.
    """
    attended: Float32 = multi_region_softmax(masked_scores(q, k, mask, scale), low_scale, bits, high_scale) @ v
    return attended


def masked_scores(q: Float32, k: Float32, mask: Float32, scale: float | Float32) -> Float32:
    scores: Float32 = (q @ k.swapaxes(-1, -2)) * np.asarray(scale, np.float32) + np.maximum(mask, LEAST_MASK)
    return scores
