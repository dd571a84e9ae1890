"""MultiRegionIntegerAttention and MultiRegionNumeratorIntegerAttention in Triton: all products are int8.

Scores are sums of int8 products. The probabilities are two matrices of codes 0..127, one for each region, each 0 where
the other one is not, and each multiplied with v in int8: both sums are exact, for any two scales. The passes over the
keys are those of the float kernel.

Two choices follow from how tensor cores take 8-bit operands, which lie in registers and in memory in groups of four
along the axis that is summed. v comes as columns (d, keys), because no instruction before 10.0 transposes bytes. And
the keys of a tile of scores stand in an order of their own (`_order`), in which the codes are already where the second
product wants them. On 9.0 they stay in registers; on 8.0, 8.9 and 12.0 Triton 3.7.1 does not see it, and each code
passes through shared memory.
"""

import triton
import triton.language as tl

from tqdit.plugins.triton_math import LEAST_MASK, LOG2_E, MAGIC, rates, tile

# Bits of the float32 MAGIC. An integer n of at most 2^22 in magnitude, added to the bits, adds n to the number: this
# converts between int32 and float32 by an addition, where instructions for it run at a quarter of the rate or less.
MAGIC_BITS: tl.constexpr = tl.constexpr(0x4B400000)


@triton.jit
def _order(KEYS: tl.constexpr):
    """The keys of the columns of a tile: of 16 columns with bits j t1 t0 b, the keys with bits t1 t0 j b.

    A thread holds the columns 2 t, 2 t + 1 of each 8 in a product's result, and four neighbours in its operand.
    """
    column = tl.arange(0, KEYS)
    return (column & ~15) + ((column >> 1) & 3) * 4 + ((column >> 3) & 1) * 2 + (column & 1)


@triton.jit
def _in_order(codes):
    """Columns in the order `_order` -> columns of ascending keys."""
    split = tl.reshape(codes, [codes.shape[0], codes.shape[1] // 16, 2, 4, 2])
    return tl.reshape(tl.permute(split, [0, 1, 3, 2, 4]), [codes.shape[0], codes.shape[1]])


@triton.jit
def _scores(
    q_main, q_rest, k, mask_row, key, HEAD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, KEYS: tl.constexpr,
    MASK_KEYS: tl.constexpr, MASKED: tl.constexpr, scale,
):  # fmt: skip
    """q k^T for the keys `key`, float32: scaled and masked if there is a mask, else raised by MAGIC, which their
    differences do not show; -inf beyond the last key."""
    k_main = tile(k, key, tl.arange(0, MAIN), KEYS, HEAD, MASK_KEYS, MAIN > HEAD)
    raised = tl.full([q_main.shape[0], key.shape[0]], MAGIC_BITS, tl.int32)
    raised = tl.dot(q_main, tl.trans(k_main), raised, out_dtype=tl.int32)
    if REST > 0:
        k_rest = tile(k, key, MAIN + tl.arange(0, REST), KEYS, HEAD, MASK_KEYS, MAIN + REST > HEAD)
        raised = tl.dot(q_rest, tl.trans(k_rest), raised, out_dtype=tl.int32)
    s = raised.to(tl.float32, bitcast=True)
    if MASKED:
        added = tl.load(mask_row + key[None, :], mask=(key < KEYS)[None, :], other=0.0)
        s = (s - MAGIC) * scale + tl.maximum(added, LEAST_MASK)
    if MASK_KEYS:
        s = tl.where((key < KEYS)[None, :], s, float("-inf"))
    return s


@triton.jit
def _codes(exponent, low_rate, high_rate, TOP: tl.constexpr, CLIP: tl.constexpr):
    """(low codes, high codes) int8 of exponent = exp(score - maximum), by `rates`; ascending keys.

    Bits of positive floats are ordered as they are, and the lowest byte of a raised code is the code.
    """
    low = (exponent * low_rate + MAGIC).to(tl.int32, bitcast=True)
    high = (exponent * high_rate + MAGIC).to(tl.int32, bitcast=True)
    if CLIP:
        high = tl.minimum(high, MAGIC_BITS + TOP)
    is_low = low <= MAGIC_BITS + TOP
    return _in_order(tl.where(is_low, low, 0).to(tl.int8)), _in_order(tl.where(is_low, 0, high).to(tl.int8))


@triton.jit
def _add_products(
    low, high, v, key, low_main, high_main, low_rest, high_rest, HEAD: tl.constexpr, MAIN: tl.constexpr,
    REST: tl.constexpr, KEYS: tl.constexpr, MASK_KEYS: tl.constexpr,
):  # fmt: skip
    """The four sums with low v^T and high v^T of these keys added."""
    v_main = tl.trans(tile(v, tl.arange(0, MAIN), key, HEAD, KEYS, MAIN > HEAD, MASK_KEYS))
    low_main = tl.dot(low, v_main, low_main, out_dtype=tl.int32)
    high_main = tl.dot(high, v_main, high_main, out_dtype=tl.int32)
    if REST > 0:
        v_rest = tl.trans(tile(v, MAIN + tl.arange(0, REST), key, HEAD, KEYS, MAIN + REST > HEAD, MASK_KEYS))
        low_rest = tl.dot(low, v_rest, low_rest, out_dtype=tl.int32)
        high_rest = tl.dot(high, v_rest, high_rest, out_dtype=tl.int32)
    return low_main, high_main, low_rest, high_rest


@triton.jit
def _store(
    out, query, column, low, high, low_unit, high_unit, shift, QUERIES: tl.constexpr, HEAD: tl.constexpr
):  # fmt: skip
    """Units are (queries, 1). An int8 result is rounded half to even and clipped."""
    y = low.to(tl.float32) * low_unit + high.to(tl.float32) * high_unit + shift
    if out.dtype.element_ty == tl.int8:
        raised = tl.minimum(tl.maximum(y, -128.0), 127.0) + MAGIC
        result = raised.to(tl.int32, bitcast=True).to(tl.int8)
    else:
        result = y.to(out.dtype.element_ty)
    inside = (query < QUERIES)[:, None] & (column < HEAD)[None, :]
    tl.store(out + query[:, None] * HEAD + column[None, :], result, mask=inside)


@triton.jit
def multi_region_integer_attention_kernel(
    q, k, v, mask, scale, low_scale, out_scale, out_shift,
    heads, masks, scales, low_scales, out_scales, out_shifts, out,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    SUMMED_MAIN: tl.constexpr, SUMMED_REST: tl.constexpr, NUMERATORS: tl.constexpr, MASKED: tl.constexpr,
    IMAGE_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, QUERY_STRIDE: tl.constexpr,
    TOP: tl.constexpr, HIGH_STEP: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """q, out (images heads, QUERIES, HEAD), k (images heads, KEYS, HEAD), v (images heads, HEAD, KEYS), contiguous,
    int8 but for out. mask as in the float kernel. Of scale, low_scale, out_scale and out_shift, float32, image i has
    the entry i % their number.

    A head is MAIN columns of the result, a power of two, and REST more; where columns are summed, in q and k, these are
    SUMMED_MAIN and SUMMED_REST, at least 32.
    NUMERATORS: what is rounded is not divided by the sum of its row; the result is.
    """
    blocks: tl.constexpr = (QUERIES + BLOCK_QUERIES - 1) // BLOCK_QUERIES
    MASK_QUERIES: tl.constexpr = QUERIES % BLOCK_QUERIES != 0
    MASK_KEYS: tl.constexpr = KEYS % BLOCK_KEYS != 0
    head = tl.program_id(0) // blocks
    image = head // heads
    query = (tl.program_id(0) % blocks) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    q_base = q + head.to(tl.int64) * QUERIES * HEAD
    k_base, v_base = k + head.to(tl.int64) * KEYS * HEAD, v + head.to(tl.int64) * KEYS * HEAD
    mask_row = mask + (image % masks).to(tl.int64) * IMAGE_STRIDE + (head % heads).to(tl.int64) * HEAD_STRIDE
    if QUERY_STRIDE > 0:
        mask_row += tl.minimum(query, QUERIES - 1)[:, None].to(tl.int64) * QUERY_STRIDE
    else:
        mask_row += tl.zeros([1, 1], tl.int32)
    factor_of_scores = tl.load(scale + image % scales)
    factor = LOG2_E if MASKED else factor_of_scores * LOG2_E
    s1 = tl.load(low_scale + image % low_scales)
    low_inverse = tl.math.div_rn(1.0, s1)

    q_main = tile(q_base, query, tl.arange(0, SUMMED_MAIN), QUERIES, HEAD, MASK_QUERIES, SUMMED_MAIN > HEAD)
    q_rest = q_main
    if SUMMED_REST > 0:
        q_rest = tile(q_base, query, SUMMED_MAIN + tl.arange(0, SUMMED_REST), QUERIES, HEAD, MASK_QUERIES,
                      SUMMED_MAIN + SUMMED_REST > HEAD)  # fmt: skip
    low_main = tl.zeros([BLOCK_QUERIES, MAIN], tl.int32)
    high_main = tl.zeros([BLOCK_QUERIES, MAIN], tl.int32)
    low_rest, high_rest = low_main, high_main
    if REST > 0:
        low_rest = tl.zeros([BLOCK_QUERIES, REST], tl.int32)
        high_rest = tl.zeros([BLOCK_QUERIES, REST], tl.int32)
    ascending = tl.arange(0, BLOCK_KEYS)
    ordered = _order(BLOCK_KEYS)

    if KEYS <= 2 * BLOCK_KEYS:
        # One tile or two, whose scores stay in registers.
        FIRST_MASKED: tl.constexpr = KEYS < BLOCK_KEYS
        s = _scores(q_main, q_rest, k_base, mask_row, ordered, HEAD, SUMMED_MAIN, SUMMED_REST, KEYS, FIRST_MASKED,
                    MASKED, factor_of_scores)  # fmt: skip
        largest = tl.max(s, 1)
        if KEYS > BLOCK_KEYS:
            second = _scores(q_main, q_rest, k_base, mask_row, BLOCK_KEYS + ordered, HEAD, SUMMED_MAIN, SUMMED_REST,
                             KEYS, MASK_KEYS, MASKED, factor_of_scores)  # fmt: skip
            largest = tl.maximum(largest, tl.max(second, 1))
        s = tl.exp2((s - largest[:, None]) * factor)
        total = tl.sum(s, 1)
        if KEYS > BLOCK_KEYS:
            second = tl.exp2((second - largest[:, None]) * factor)
            total += tl.sum(second, 1)
        low_rate, high_rate = rates(total, low_inverse, HIGH_STEP, NUMERATORS)
        low, high = _codes(s, low_rate, high_rate, TOP, CLIP)
        low_main, high_main, low_rest, high_rest = _add_products(
            low, high, v_base, ascending, low_main, high_main, low_rest, high_rest, HEAD, MAIN, REST, KEYS, FIRST_MASKED
        )
        if KEYS > BLOCK_KEYS:
            low, high = _codes(second, low_rate, high_rate, TOP, CLIP)
            low_main, high_main, low_rest, high_rest = _add_products(
                low, high, v_base, BLOCK_KEYS + ascending, low_main, high_main, low_rest, high_rest, HEAD, MAIN, REST,
                KEYS, MASK_KEYS,
            )  # fmt: skip
    else:
        largest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_QUERIES], tl.float32)
        for first in range(0, KEYS, BLOCK_KEYS):
            s = _scores(q_main, q_rest, k_base, mask_row, first + ordered, HEAD, SUMMED_MAIN, SUMMED_REST, KEYS,
                        MASK_KEYS, MASKED, factor_of_scores)  # fmt: skip
            grown = tl.maximum(largest, tl.max(s, 1))
            if not NUMERATORS:
                exponent = tl.exp2((s - grown[:, None]) * factor)
                total = total * tl.exp2((largest - grown) * factor) + tl.sum(exponent, 1)
            largest = grown
        low_rate, high_rate = rates(total, low_inverse, HIGH_STEP, NUMERATORS)
        for first in range(0, KEYS, BLOCK_KEYS):
            s = _scores(q_main, q_rest, k_base, mask_row, first + ordered, HEAD, SUMMED_MAIN, SUMMED_REST, KEYS,
                        MASK_KEYS, MASKED, factor_of_scores)  # fmt: skip
            exponent = tl.exp2((s - largest[:, None]) * factor)
            if NUMERATORS:
                total += tl.sum(exponent, 1)
            low, high = _codes(exponent, low_rate, high_rate, TOP, CLIP)
            low_main, high_main, low_rest, high_rest = _add_products(
                low, high, v_base, first + ascending, low_main, high_main, low_rest, high_rest, HEAD, MAIN, REST, KEYS,
                MASK_KEYS,
            )  # fmt: skip

    unit = tl.full([BLOCK_QUERIES], 1.0, tl.float32) * tl.load(out_scale + image % out_scales)
    if NUMERATORS:
        unit = tl.math.div_rn(unit, total)
    low_unit, high_unit = (unit * s1)[:, None], (unit * HIGH_STEP)[:, None]
    shift = tl.load(out_shift + image % out_shifts)
    out_base = out + head.to(tl.int64) * QUERIES * HEAD
    _store(out_base, query, tl.arange(0, MAIN), low_main, high_main, low_unit, high_unit, shift, QUERIES, HEAD)
    if REST > 0:
        _store(
            out_base, query, MAIN + tl.arange(0, REST), low_rest, high_rest, low_unit, high_unit, shift, QUERIES, HEAD
        )
