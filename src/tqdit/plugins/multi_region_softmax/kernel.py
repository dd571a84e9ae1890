"""MultiRegionSoftmax in Triton: one pass per row, scores read once and probabilities written once."""

import triton
import triton.language as tl

from tqdit.plugins.triton_math import round_half_even, two_regions


@triton.jit
def multi_region_softmax_kernel(
    scores, low_step, rows, rows_per_image, low_steps, out,
    COLUMNS: tl.constexpr, TOP: tl.constexpr, HIGH_STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """scores, out (rows, COLUMNS) contiguous; low_step float32 (low_steps,), one per image or one for all."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    offset = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    x = tl.load(scores + offset, mask=inside, other=float("-inf")).to(tl.float32)
    s1 = tl.load(low_step + (row // rows_per_image) % low_steps, mask=row < rows, other=1.0)[:, None]
    exponent = tl.exp(x - tl.max(x, 1)[:, None])
    p = exponent * tl.math.div_rn(1.0, tl.sum(exponent, 1))[:, None]
    # The reference's own divisions, so that what is a tie there is one here: 0.5 / float32(1/7) is below 3.5.
    low_code = round_half_even(tl.math.div_rn(p, s1))
    high_code = round_half_even(tl.math.div_rn(p, tl.full(p.shape, HIGH_STEP, tl.float32)))
    quantized = two_regions(low_code, high_code, s1, TOP, HIGH_STEP)
    tl.store(out + offset, quantized.to(out.dtype.element_ty), mask=inside)
