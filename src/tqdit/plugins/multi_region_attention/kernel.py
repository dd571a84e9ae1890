"""MultiRegionAttention and MultiRegionNumeratorAttention in Triton: scores, softmax, rounding on two regions and the
value product in one kernel.

Rounding needs the final maximum of a row, and its sum if probabilities are rounded. Where all keys fit two tiles the
scores stay in registers; else they are computed twice, first for maximum and sum, then for the rounded values.
Numerators need the maximum alone, so that their first pass has no exponentials. Nothing of size N x N leaves the chip.
"""

import triton
import triton.language as tl

from tqdit.plugins.triton_math import LEAST_MASK, LOG2_E, MAGIC, rates, tile


@triton.jit
def _scores(
    q_main, q_rest, k, mask_row, key, HEAD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, KEYS: tl.constexpr,
    MASK_KEYS: tl.constexpr, MASKED: tl.constexpr, scale, PRECISION: tl.constexpr,
):  # fmt: skip
    """q k^T for one tile of keys, float32; scaled and masked if there is a mask; -inf beyond the last key."""
    main = tl.arange(0, MAIN)
    k_main = tile(k, key, main, KEYS, HEAD, MASK_KEYS, MAIN > HEAD)
    s = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)
    if REST > 0:
        k_rest = tile(k, key, MAIN + tl.arange(0, REST), KEYS, HEAD, MASK_KEYS, MAIN + REST > HEAD)
        s = tl.dot(q_rest, tl.trans(k_rest), s, input_precision=PRECISION)
    if MASKED:
        added = tl.load(mask_row + key[None, :], mask=(key < KEYS)[None, :], other=0.0)
        s = s * scale + tl.maximum(added, LEAST_MASK)
    if MASK_KEYS:
        s = tl.where((key < KEYS)[None, :], s, float("-inf"))
    return s


@triton.jit
def _codes(exponent, low_rate, high_rate, ratio, TOP: tl.constexpr, CLIP: tl.constexpr):
    """Quantized probabilities in units of the low scale: the low code, or the high code times s2 / s1.

    exponent = exp(score - maximum), ratio = s2 / s1; rates of `rates`.
    """
    low = (exponent * low_rate + MAGIC) - MAGIC
    high = (exponent * high_rate + MAGIC) - MAGIC
    if CLIP:
        high = tl.minimum(high, TOP * 1.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(low <= TOP, low, high * ratio)


@triton.jit
def multi_region_attention_kernel(
    q, k, v, mask, low_scale, heads, low_scales, masks, scale_bits, out,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    NUMERATORS: tl.constexpr, MASKED: tl.constexpr,
    IMAGE_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, QUERY_STRIDE: tl.constexpr,
    TOP: tl.constexpr, HIGH_STEP: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, out (images heads, QUERIES, HEAD), k, v (images heads, KEYS, HEAD), contiguous; low_scale as in the softmax.

    mask float32: of its `masks` images, image i has number i % masks; a stride of 0 stands for an axis of length 1.
    scale_bits: the scale of the scores, the bits of a float32.
    A head is MAIN columns, a power of two, and REST more, a power of two or 0: 72 is 64 + 16, not 128.
    NUMERATORS: what is rounded is not divided by the sum of its row; the result is.
    """
    blocks: tl.constexpr = (QUERIES + BLOCK_QUERIES - 1) // BLOCK_QUERIES
    MASK_QUERIES: tl.constexpr = QUERIES % BLOCK_QUERIES != 0
    MASK_KEYS: tl.constexpr = KEYS % BLOCK_KEYS != 0
    scale = scale_bits.to(tl.float32, bitcast=True)
    factor = LOG2_E if MASKED else scale * LOG2_E
    head = tl.program_id(0) // blocks
    query = (tl.program_id(0) % blocks) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    main = tl.arange(0, MAIN)
    start = head.to(tl.int64) * QUERIES * HEAD
    q_base, out_base = q + start, out + start
    k_base, v_base = k + head.to(tl.int64) * KEYS * HEAD, v + head.to(tl.int64) * KEYS * HEAD
    mask_row = mask + ((head // heads) % masks).to(tl.int64) * IMAGE_STRIDE + (head % heads).to(tl.int64) * HEAD_STRIDE
    if QUERY_STRIDE > 0:
        mask_row += tl.minimum(query, QUERIES - 1)[:, None].to(tl.int64) * QUERY_STRIDE
    else:
        mask_row += tl.zeros([1, 1], tl.int32)
    s1 = tl.load(low_scale + (head // heads) % low_scales)
    low_inverse = tl.math.div_rn(1.0, s1)
    ratio = tl.math.div_rn(HIGH_STEP, s1)

    q_main = tile(q_base, query, main, QUERIES, HEAD, MASK_QUERIES, MAIN > HEAD)
    sums = tl.zeros([BLOCK_QUERIES, MAIN], tl.float32)
    q_rest = q_main
    rest_sums = sums
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        q_rest = tile(q_base, query, rest, QUERIES, HEAD, MASK_QUERIES, MAIN + REST > HEAD)
        rest_sums = tl.zeros([BLOCK_QUERIES, REST], tl.float32)

    if KEYS <= 2 * BLOCK_KEYS:
        # One tile or two, whose scores stay in registers.
        key = tl.arange(0, BLOCK_KEYS)
        s = _scores(
            q_main, q_rest, k_base, mask_row, key, HEAD, MAIN, REST, KEYS, KEYS < BLOCK_KEYS, MASKED, scale, PRECISION
        )
        largest = tl.max(s, 1)
        if KEYS > BLOCK_KEYS:
            later = BLOCK_KEYS + key
            second = _scores(
                q_main, q_rest, k_base, mask_row, later, HEAD, MAIN, REST, KEYS, MASK_KEYS, MASKED, scale, PRECISION
            )
            largest = tl.maximum(largest, tl.max(second, 1))
        offset = (largest * factor)[:, None]
        s = tl.exp2(s * factor - offset)
        total = tl.sum(s, 1)
        if KEYS > BLOCK_KEYS:
            second = tl.exp2(second * factor - offset)
            total += tl.sum(second, 1)
        low_rate, high_rate = rates(total, low_inverse, HIGH_STEP, NUMERATORS)
        codes = _codes(s, low_rate, high_rate, ratio, TOP, CLIP).to(q_main.dtype)
        v_main = tile(v_base, key, main, KEYS, HEAD, KEYS < BLOCK_KEYS, MAIN > HEAD)
        sums = tl.dot(codes, v_main, sums, input_precision=PRECISION)
        if REST > 0:
            v_rest = tile(v_base, key, rest, KEYS, HEAD, KEYS < BLOCK_KEYS, MAIN + REST > HEAD)
            rest_sums = tl.dot(codes, v_rest, rest_sums, input_precision=PRECISION)
        if KEYS > BLOCK_KEYS:
            codes = _codes(second, low_rate, high_rate, ratio, TOP, CLIP).to(q_main.dtype)
            v_main = tile(v_base, later, main, KEYS, HEAD, MASK_KEYS, MAIN > HEAD)
            sums = tl.dot(codes, v_main, sums, input_precision=PRECISION)
            if REST > 0:
                v_rest = tile(v_base, later, rest, KEYS, HEAD, MASK_KEYS, MAIN + REST > HEAD)
                rest_sums = tl.dot(codes, v_rest, rest_sums, input_precision=PRECISION)
    else:
        largest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_QUERIES], tl.float32)
        for first in range(0, KEYS, BLOCK_KEYS):
            key = first + tl.arange(0, BLOCK_KEYS)
            s = _scores(
                q_main, q_rest, k_base, mask_row, key, HEAD, MAIN, REST, KEYS, MASK_KEYS, MASKED, scale, PRECISION
            )
            grown = tl.maximum(largest, tl.max(s, 1))
            if not NUMERATORS:
                exponent = tl.exp2(s * factor - (grown * factor)[:, None])
                total = total * tl.exp2((largest - grown) * factor) + tl.sum(exponent, 1)
            largest = grown
        low_rate, high_rate = rates(total, low_inverse, HIGH_STEP, NUMERATORS)
        for first in range(0, KEYS, BLOCK_KEYS):
            key = first + tl.arange(0, BLOCK_KEYS)
            s = _scores(
                q_main, q_rest, k_base, mask_row, key, HEAD, MAIN, REST, KEYS, MASK_KEYS, MASKED, scale, PRECISION
            )
            v_main = tile(v_base, key, main, KEYS, HEAD, MASK_KEYS, MAIN > HEAD)
            exponent = tl.exp2(s * factor - (largest * factor)[:, None])
            if NUMERATORS:
                total += tl.sum(exponent, 1)
            codes = _codes(exponent, low_rate, high_rate, ratio, TOP, CLIP).to(v_main.dtype)
            sums = tl.dot(codes, v_main, sums, input_precision=PRECISION)
            if REST > 0:
                v_rest = tile(v_base, key, rest, KEYS, HEAD, MASK_KEYS, MAIN + REST > HEAD)
                rest_sums = tl.dot(codes, v_rest, rest_sums, input_precision=PRECISION)

    unit = s1
    if NUMERATORS:
        unit = tl.math.div_rn(s1, total)[:, None]
    inside = (query < QUERIES)[:, None]
    row = query[:, None] * HEAD
    tl.store(out_base + row + main[None, :], (sums * unit).to(out.dtype.element_ty),
             mask=inside & (main < HEAD)[None, :])  # fmt: skip
    if REST > 0:
        tl.store(out_base + row + rest[None, :], (rest_sums * unit).to(out.dtype.element_ty),
                 mask=inside & (rest < HEAD)[None, :])  # fmt: skip
