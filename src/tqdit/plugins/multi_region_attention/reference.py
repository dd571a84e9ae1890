"""MultiRegionAttention in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tqdit.plugins.multi_region_softmax.reference import multi_region_softmax

Float32 = NDArray[np.float32]


def multi_region_attention(
    q: Float32, k: Float32, v: Float32, low_step: Float32, bits: int, high_step: float, scale: float
) -> Float32:
    """q (B, H, N, d), k and v (B, H, M, d), low_step (B,) or (1,) -> (B, H, N, d), all float32.

    MultiRegionSoftmax(scale q kᵀ, low_step) v. Nothing else is rounded: q, k and v come as the caller quantized them.
    """
    scores = (q @ k.swapaxes(-1, -2)) * np.float32(scale)
    attended: Float32 = multi_region_softmax(scores, low_step, bits, high_step) @ v
    return attended
