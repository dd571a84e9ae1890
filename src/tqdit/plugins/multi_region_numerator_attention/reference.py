"""MultiRegionNumeratorAttention in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tqdit.plugins.multi_region_attention.reference import masked_scores
from tqdit.plugins.multi_region_numerator.reference import multi_region_numerator

Float32 = NDArray[np.float32]


def multi_region_numerator_attention(
    q: Float32, k: Float32, v: Float32, mask: Float32, low_scale: Float32, bits: int, high_scale: float, scale: float
) -> Float32:
    """As `multi_region_attention`, but (e^ v) / sum(e) with the numerators e of MultiRegionNumerator."""
    numerators, reciprocals = multi_region_numerator(masked_scores(q, k, mask, scale), low_scale, bits, high_scale)
    attended: Float32 = (numerators @ v) * reciprocals
    return attended
