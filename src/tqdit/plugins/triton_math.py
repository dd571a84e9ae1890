"""What the Triton kernels share: tiles, rounding half to even and the two regions of a rounded softmax.

The functions run on the GPU, in Triton's ahead-of-time compiler and in its CPU interpreter (TRITON_INTERPRET=1).
"""

import triton
import triton.language as tl

# 1.5 * 2^23: float32 numbers of this size are one apart, so adding it rounds to an integer, half to even as the adder
# does. Exact for |x| <= 2^22; larger x stay larger than any code, which is all that the regions ask.
MAGIC: tl.constexpr = tl.constexpr(12582912.0)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LEAST_MASK: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def round_half_even(x):
    """ONNX Round and NumPy round. libdevice's rint is the same but missing in the interpreter."""
    return (x + MAGIC) - MAGIC


@triton.jit
def two_regions(low_code, high_code, s1, TOP: tl.constexpr, HIGH_STEP: tl.constexpr):
    """Quantized values from the rounded quotients p / s1 and p / s2; NaN stays NaN."""
    high = tl.minimum(high_code, TOP * 1.0, propagate_nan=tl.PropagateNan.ALL) * HIGH_STEP
    return tl.where(low_code <= TOP, low_code * s1, high)


@triton.jit
def tile(base, row, column, rows, COLUMNS: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """Rows `row` and columns `column` of a contiguous (rows, COLUMNS) matrix; zeros outside."""
    offset = row[:, None] * COLUMNS + column[None, :]
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(base + offset, mask=(row < rows)[:, None] & (column < COLUMNS)[None, :], other=0.0)
    if MASK_ROWS:
        return tl.load(base + offset, mask=(row < rows)[:, None], other=0.0)
    if MASK_COLUMNS:
        return tl.load(base + offset, mask=(column < COLUMNS)[None, :], other=0.0)
    return tl.load(base + offset)


@triton.jit
def rates(total, low_inverse, HIGH_STEP: tl.constexpr, NUMERATORS: tl.constexpr):
    """What exponentials are multiplied with to get codes: 1 / (sum s1) and 1 / (sum s2), of numerators without sum."""
    rate = tl.full(total.shape, 1.0, tl.float32) if NUMERATORS else tl.math.div_rn(1.0, total)
    return (rate * low_inverse)[:, None], (rate * (1.0 / HIGH_STEP))[:, None]
