"""MultiRegionIntegerAttention in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.plugins.multi_region_attention.reference import masked_scores
from tqdit.plugins.multi_region_softmax.reference import multi_region_softmax

Int8 = NDArray[np.int8]
Float32 = NDArray[np.float32]
INT8 = 3  # ONNX's number of the type


def multi_region_integer_attention(
    q: Int8, k: Int8, v: Int8, mask: Float32, scale: Float32, low_scale: Float32, out_scale: Float32,
    out_shift: Float32, bits: int, high_scale: float, out_type: int,
) -> NDArray[Any]:  # fmt: skip
    """q (B, H, N, d), k (B, H, M, d), v (B, H, d, M), mask (B, H, N, M) with any axis of length 1; scale, low_scale,
    out_scale, out_shift (B,) or (1,), all float32 -> (B, H, N, d) int8 if out_type is INT8, else float32.

    y = out_scale MultiRegionSoftmax(scale q kᵀ + max(mask, -1e30), low_scale) vᵀ + out_shift; as int8
    clip(round(y), -128, 127). A float result is not yet rounded to its type.
    """
    p = multi_region_softmax(integer_scores(q, k, mask, scale), low_scale, bits, high_scale)
    return finished(p @ v.swapaxes(-1, -2).astype(np.float32), out_scale, out_shift, out_type)


def integer_scores(q: Int8, k: Int8, mask: Float32, scale: Float32) -> Float32:
    return masked_scores(q.astype(np.float32), k.astype(np.float32), mask, of_image(scale))


def finished(attended: Float32, out_scale: Float32, out_shift: Float32, out_type: int) -> NDArray[Any]:
    y: Float32 = attended * of_image(out_scale) + of_image(out_shift)
    return np.clip(np.round(y), -128, 127).astype(np.int8) if out_type == INT8 else y


def of_image(values: Float32) -> Float32:
    return values.reshape(-1, 1, 1, 1)
