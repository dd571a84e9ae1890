"""MultiRegionSoftmax and MultiRegionNumerator in Triton: one program per few rows.

Rows that fit one tile are read once; longer ones three times, for maximum, sum and rounding. Results are written once.
"""

import triton
import triton.language as tl

from tqdit.plugins.triton_math import round_half_even, two_regions


@triton.jit
def _tile(scores, row, rows, first, COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """(scores from column `first` on, -inf outside; their offsets; which of them are inside)."""
    column = first + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    offset = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    return tl.load(scores + offset, mask=inside, other=float("-inf")).to(tl.float32), offset, inside


@triton.jit
def _rounded(value, s1, TOP: tl.constexpr, HIGH_STEP: tl.constexpr):
    """The reference's own divisions, so that what is a tie there is one here: 0.5 / float32(1/7) is below 3.5."""
    low_code = round_half_even(tl.math.div_rn(value, s1))
    high_code = round_half_even(tl.math.div_rn(value, tl.full(value.shape, HIGH_STEP, tl.float32)))
    return two_regions(low_code, high_code, s1, TOP, HIGH_STEP)


@triton.jit
def _quantize_rows(
    scores, low_scale, row, rows, rows_per_image, low_scales, out, NUMERATORS: tl.constexpr,
    COLUMNS: tl.constexpr, TOP: tl.constexpr, HIGH_STEP: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the rounded numerators or probabilities of the rows; returns the reciprocals of their sums."""
    s1 = tl.load(low_scale + (row // rows_per_image) % low_scales, mask=row < rows, other=1.0)[:, None]
    x, offset, inside = _tile(scores, row, rows, 0, COLUMNS, BLOCK_COLUMNS)
    largest = tl.max(x, 1)
    if COLUMNS > BLOCK_COLUMNS:
        for first in range(BLOCK_COLUMNS, COLUMNS, BLOCK_COLUMNS):
            x, offset, inside = _tile(scores, row, rows, first, COLUMNS, BLOCK_COLUMNS)
            largest = tl.maximum(largest, tl.max(x, 1))
        total = tl.zeros(row.shape, tl.float32)
        for first in range(0, COLUMNS, BLOCK_COLUMNS):
            x, offset, inside = _tile(scores, row, rows, first, COLUMNS, BLOCK_COLUMNS)
            total += tl.sum(tl.exp(x - largest[:, None]), 1)
        reciprocal = tl.math.div_rn(1.0, total)
        for first in range(0, COLUMNS, BLOCK_COLUMNS):
            x, offset, inside = _tile(scores, row, rows, first, COLUMNS, BLOCK_COLUMNS)
            value = tl.exp(x - largest[:, None])
            value = value if NUMERATORS else value * reciprocal[:, None]
            tl.store(out + offset, _rounded(value, s1, TOP, HIGH_STEP).to(out.dtype.element_ty), mask=inside)
    else:
        value = tl.exp(x - largest[:, None])
        reciprocal = tl.math.div_rn(1.0, tl.sum(value, 1))
        value = value if NUMERATORS else value * reciprocal[:, None]
        tl.store(out + offset, _rounded(value, s1, TOP, HIGH_STEP).to(out.dtype.element_ty), mask=inside)
    return reciprocal


@triton.jit
def multi_region_softmax_kernel(
    scores, low_scale, rows, rows_per_image, low_scales, out,
    COLUMNS: tl.constexpr, TOP: tl.constexpr, HIGH_STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """scores, out (rows, COLUMNS) contiguous; low_scale float32 (low_scales,), one per image or one for all."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    _quantize_rows(scores, low_scale, row, rows, rows_per_image, low_scales, out, False,
                   COLUMNS, TOP, HIGH_STEP, BLOCK_COLUMNS)  # fmt: skip


@triton.jit
def multi_region_numerator_kernel(
    scores, low_scale, rows, rows_per_image, low_scales, out, reciprocals,
    COLUMNS: tl.constexpr, TOP: tl.constexpr, HIGH_STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """As above, with numerators in `out`; reciprocals float32 (rows,)."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    reciprocal = _quantize_rows(scores, low_scale, row, rows, rows_per_image, low_scales, out, True,
                                COLUMNS, TOP, HIGH_STEP, BLOCK_COLUMNS)  # fmt: skip
    tl.store(reciprocals + row, reciprocal, mask=row < rows)
