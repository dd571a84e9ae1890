"""MultiRegionNumeratorIntegerAttention in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.plugins.multi_region_integer_attention.reference import finished, integer_scores
from tqdit.plugins.multi_region_numerator.reference import multi_region_numerator

Int8 = NDArray[np.int8]
Float32 = NDArray[np.float32]


def multi_region_numerator_integer_attention(
    q: Int8, k: Int8, v: Int8, mask: Float32, scale: Float32, low_scale: Float32, out_scale: Float32,
    out_shift: Float32, bits: int, high_scale: float, out_type: int,
) -> NDArray[Any]:  # fmt: skip
    """As `multi_region_integer_attention`, but (e^ vᵀ) / sum(e) with the numerators e of MultiRegionNumerator."""
    numerators, reciprocals = multi_region_numerator(integer_scores(q, k, mask, scale), low_scale, bits, high_scale)
    product = numerators @ v.swapaxes(-1, -2).astype(np.float32)
    return finished(product * reciprocals, out_scale, out_shift, out_type)
