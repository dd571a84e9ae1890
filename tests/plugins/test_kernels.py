"""The Triton kernels equal the NumPy references and the function bodies.

They run in Triton's CPU interpreter, or on the GPU where there is one. Tolerance: where a quotient lies at a rounding
tie (within 1e-5 of one, relative) the last bit of a float32 operation decides between two neighbouring codes, and both
are accepted; elsewhere codes are equal. Ties that are exact in float32 are tested apart and must round to even.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_device import DEVICE, NO_MASK, regions, run_attention, run_numerator, run_select, run_softmax
from support import few
from tqdit.errors import UsageError
from tqdit.plugins.kernels import MAX_TOKENS
from tqdit.plugins.multi_region_attention.launch import Blocks
from tqdit.plugins.multi_region_attention.launch import kernel as attention_kernel
from tqdit.plugins.multi_region_attention.launch import launch as attention_launch
from tqdit.plugins.multi_region_attention.reference import multi_region_attention
from tqdit.plugins.multi_region_numerator.reference import multi_region_numerator
from tqdit.plugins.multi_region_softmax.launch import kernel as softmax_kernel
from tqdit.plugins.multi_region_softmax.reference import multi_region_softmax
from tqdit.plugins.time_group_select.reference import time_group_select

pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 and Arm only")

# Rounding of the output, and in the attention of the high codes where s2 / s1 is no power of two.
PRECISION = {"fp32": 2e-6, "fp16": 2**-10, "bf16": 2**-7}

# Triton's interpreter multiplies bfloat16 tiles as if they were integers.
PRODUCT_TYPES = ["fp32", "fp16", *(["bf16"] if DEVICE == "cuda" else [])]


def high_scale(bits, whole_range=True):
    q = 2 ** (bits - 1)
    return 1 / (q - 1 if whole_range else q)


def low_scales(rng, rows, bits, any_step=False):
    """Candidates of the method, mixed over the rows, or any scale between the smallest and the largest."""
    exponent = rng.uniform(0, bits - 1, rows) if any_step else rng.integers(0, bits, rows)
    return (high_scale(bits) * 2.0**-exponent).astype(np.float32)


def assert_quantized(out, scores, low_scale, bits, high, floats="fp32", numerators=False):
    expected, off = regions(scores, low_scale, bits, high, numerators)
    assert (np.abs(out - expected) <= PRECISION[floats] * expected + 1.001 * off).all()


def assert_attended(out, q, k, v, low_scale, bits, high, scale, floats="fp32", mask=NO_MASK, numerators=False):
    q, k, v = (each.astype(np.float64) for each in (q, k, v))
    quantized, off = regions(q @ k.swapaxes(-1, -2) * scale + mask, low_scale, bits, high, numerators)
    bound = PRECISION[floats] * (quantized @ np.abs(v)) + 1.001 * (off @ np.abs(v)) + 1e-6
    assert (np.abs(out - quantized @ v) <= bound).all()
    assert (off > 0).mean() < 0.02  # nearly everything is compared


def test_the_kernels_run_where_they_should():
    kind = type(softmax_kernel("fp32", 8, 8, 1 / 127).load()).__name__
    assert kind == ("JITFunction" if DEVICE == "cuda" else "InterpretedFunction")


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_time_group_select(data):
    boundaries = np.array(sorted(data.draw(st.sets(st.integers(1, 999), max_size=9))), np.int64)
    # timesteps around every boundary, so every group and both sides of each edge
    near = [t for b in boundaries for t in (b - 1, b, b + 1)]
    timestep = np.array([*near, *data.draw(st.lists(st.integers(0, 999), min_size=1, max_size=140))], np.int64)
    trailing = data.draw(st.sampled_from([(), (1, 1, 1), (3,), (130,)]))
    floats = data.draw(st.sampled_from(["fp32", "fp16", "bf16"]))
    table = np.random.default_rng(0).integers(-99, 99, (len(boundaries) + 1, *trailing)).astype(np.float32)
    if data.draw(st.booleans()):  # flow matching: float timesteps such as 0.1
        timestep, boundaries = (np.float32(0.001) * each.astype(np.float32) for each in (timestep, boundaries))
    out = run_select(timestep, boundaries, table, floats)
    np.testing.assert_array_equal(out, time_group_select(timestep, boundaries, table))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_multi_region_softmax(data):
    images, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    queries, columns = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 70))
    bits, floats = data.draw(st.integers(2, 8)), data.draw(st.sampled_from(["fp32", "fp16", "bf16"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    scores = rng.normal(0, 3, (images, heads, queries, columns)).astype(np.float16).astype(np.float32)
    if floats == "bf16":
        scores = scores.round(1).astype(np.float32).view(np.uint32) & 0xFFFF0000
        scores = scores.astype(np.uint32).view(np.float32)
    low = low_scales(rng, data.draw(st.sampled_from([1, images])), bits, data.draw(st.booleans()))
    high = high_scale(bits, data.draw(st.booleans()))
    out = run_softmax(scores, low, bits, high, floats)
    assert_quantized(out, scores, low, bits, np.float32(high), floats)
    numerators, reciprocals = run_numerator(scores, low, bits, high, floats)
    assert_quantized(numerators * reciprocals, scores, low, bits, np.float32(high), floats, numerators=True)


@pytest.mark.parametrize("bits", range(2, 9))
def test_multi_region_softmax_equals_its_float32_reference(bits):
    """Bit for bit, since the kernel divides where the reference divides; a sum in another order may flip a code."""
    rng = np.random.default_rng(bits)
    scores, low = rng.normal(0, 3, (4, 2, 30, 64)).astype(np.float32), low_scales(rng, 4, bits)
    out = run_softmax(scores, low, bits, high_scale(bits))
    assert (out != multi_region_softmax(scores, low, bits, high_scale(bits))).mean() <= 1e-4
    numerators, reciprocals = run_numerator(scores, low, bits, high_scale(bits))
    expected, sums = multi_region_numerator(scores, low, bits, high_scale(bits))
    assert (numerators != expected).mean() <= 1e-4
    np.testing.assert_allclose(reciprocals, sums, rtol=1e-6)


def tied_scores(count, columns=8):
    """A row with `count` equal probabilities 1 / count, exact in float32 for powers of two."""
    scores = np.full((1, 1, 3, columns), -np.inf, np.float32)
    scores[..., :count] = 1.5
    return scores


def tying_scale(code):
    """(n, scale): n equal probabilities 1 / n whose quotient by the float32 scale is `code` exactly, in float32."""
    for count in range(1, 9):
        p = np.float32(1 / count)
        for scale in (p / np.float32(code), np.nextafter(p / np.float32(code), np.float32(0))):
            if p / scale == np.float32(code):
                return count, np.array([scale], np.float32)
    raise AssertionError(code)


@pytest.mark.parametrize("code", [0.5, 1.5, 2.5, 3.5, 60.5, 63.5, 125.5, 126.5])
def test_ties_round_to_even(code):
    count, low = tying_scale(code)
    expected = multi_region_softmax(tied_scores(count), low, 8, 1 / 127)
    np.testing.assert_array_equal(expected[0, 0, 0, 0], np.float32(np.round(code)) * low[0])
    np.testing.assert_array_equal(run_softmax(tied_scores(count), low, 8, 1 / 127), expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_ties_of_the_high_region_round_to_even(bits):
    """p = 1/2 with s2 = 1 / (q - 1) lies between the codes (q - 2) / 2 and q / 2, of which one is even."""
    low = np.array([high_scale(bits) / 2 ** (bits - 1)], np.float32)
    expected = multi_region_softmax(tied_scores(2), low, bits, high_scale(bits))
    np.testing.assert_array_equal(run_softmax(tied_scores(2), low, bits, high_scale(bits)), expected)


def extreme_scores(columns):
    scores = np.zeros((1, 1, 5, columns), np.float32)
    scores[0, 0, 1, 1:2] = 50
    scores[0, 0, 2, : columns // 2] = -np.inf
    scores[0, 0, 3] = -np.inf
    scores[0, 0, 4] = -1000 * np.arange(columns)
    return scores


@pytest.mark.parametrize("columns", [1, 4, 33])
def test_extreme_scores(columns):
    """All equal, one-hot, masked, far apart; a row of -inf gives NaN as Softmax does."""
    scores, low = extreme_scores(columns), np.array([1 / 127 / 8], np.float32)
    out = run_softmax(scores, low, 8, 1 / 127)
    with np.errstate(invalid="ignore"):
        expected = multi_region_softmax(scores, low, 8, 1 / 127)
    assert np.isnan(out[0, 0, 3]).all()
    np.testing.assert_array_equal(out, expected)
    numerators, reciprocals = run_numerator(scores, low, 8, 1 / 127)
    with np.errstate(invalid="ignore"):
        expected, sums = multi_region_numerator(scores, low, 8, 1 / 127)
    np.testing.assert_array_equal(numerators, expected)
    np.testing.assert_allclose(reciprocals, sums, rtol=1e-6)


@pytest.mark.parametrize("columns", [256, 1000, 4096, 4097, 10_000])
def test_many_tokens(columns):
    """More than 4,096 pass through the registers in tiles; a row's maximum may lie in any of them, a mask hide one."""
    rng = np.random.default_rng(0)
    scores, low = rng.normal(0, 4, (2, 1, 3, columns)).astype(np.float32), low_scales(rng, 2, 8)
    scores[0, 0, 0, :4096:2], scores[0, 0, 1, : columns // 2], scores[0, 0, 2, -1] = -np.inf, -np.inf, 20
    assert_quantized(run_softmax(scores, low, 8, 1 / 127), scores, low, 8, np.float32(1 / 127))
    numerators, reciprocals = run_numerator(scores, low, 8, 1 / 127)
    assert_quantized(numerators * reciprocals, scores, low, 8, np.float32(1 / 127), numerators=True)
    assert (numerators[scores == -np.inf] == 0).all()


def codes(rng, shape, bits=8):
    """Integer codes, as the exporter hands them over."""
    q = 2 ** (bits - 1)
    return np.clip(rng.normal(0, q / 3, shape).round(), -q, q - 1).astype(np.float32)


TILES = {
    "in one tile": Blocks(16, 128, 4, 1),
    "in two tiles": Blocks(64, 64, 4, 1),
    "computed twice": Blocks(32, 16, 4, 2),
}


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_multi_region_attention(data):
    images, heads, head = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 100))
    queries, keys = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    bits, floats = data.draw(st.integers(2, 8)), data.draw(st.sampled_from(PRODUCT_TYPES))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    q, k, v = (codes(rng, (images, heads, n, head)) for n in (queries, keys, keys))
    scale = data.draw(st.floats(0.5, 5)) / (43 * 43 * head**0.5)
    low = low_scales(rng, data.draw(st.sampled_from([1, images])), bits, data.draw(st.booleans()))
    high = high_scale(bits, data.draw(st.booleans()))
    blocks, numerators = data.draw(st.sampled_from([None, *TILES.values()])), data.draw(st.booleans())
    out = run_attention(q, k, v, NO_MASK, low, bits, high, scale, floats, blocks, numerators)
    assert_attended(out, q, k, v, low, bits, np.float32(high), np.float32(scale), floats, numerators=numerators)


MASKS = [(2, 2, 40, 50), (1, 2, 1, 50), (2, 1, 1, 50), (1, 1, 40, 50), (2, 1, 40, 1)]


@pytest.mark.parametrize(("shape", "numerators", "tile"), few(  # each shape, and each tiling of both kinds, once
    itertools.product(MASKS, [False, True], TILES),
    (MASKS[0], False, "computed twice"), (MASKS[1], True, "in one tile"), (MASKS[2], False, "in two tiles"),
    (MASKS[3], True, "in two tiles"), (MASKS[4], True, "computed twice"), (MASKS[4], False, "in one tile"),
))  # fmt: skip
def test_a_mask_with_any_axis_of_length_one(shape, numerators, tile):
    """Some keys are masked, others have a bias; a mask with one value for all keys changes nothing."""
    rng = np.random.default_rng(0)
    q, k, v = (codes(rng, (2, 2, n, 72)) for n in (40, 50, 50))
    mask = np.where(rng.random(shape) < 0.5, -np.inf, rng.normal(0, 1, shape)).astype(np.float32)
    mask[..., 0] = 0.5
    low, scale = low_scales(rng, 2, 8), 3 / (43 * 43 * 72**0.5)
    out = run_attention(q, k, v, mask, low, 8, 1 / 127, scale, "fp16", TILES[tile], numerators)
    mask = np.maximum(mask, -1e30)
    assert_attended(out, q, k, v, low, 8, np.float32(1 / 127), np.float32(scale), "fp16", mask, numerators)


@pytest.mark.parametrize("numerators", [False, True])
@pytest.mark.parametrize("blocks", TILES.values(), ids=TILES)
def test_a_query_that_sees_no_key_has_equal_probabilities(blocks, numerators):
    rng = np.random.default_rng(0)
    q, k, v = (codes(rng, (1, 1, n, 16)) for n in (5, 80, 80))
    mask = np.full((1, 1, 1, 80), -np.inf, np.float32)
    low = np.array([1 / 127 if numerators else 1 / 80], np.float32)
    out = run_attention(q, k, v, mask, low, 8, 1 / 127, 1.0, "fp32", blocks, numerators)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(2, keepdims=True), out.shape), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("tile", "head"), few(  # the property above draws heads of up to 100
    itertools.product(TILES, [64, 72, 88, 128]),
    ("in one tile", 128), ("in two tiles", 88), ("computed twice", 64), ("in one tile", 72),
))  # fmt: skip
def test_every_head_size_in_every_tiling(tile, head):
    rng = np.random.default_rng(head)
    q, k, v = (codes(rng, (1, 2, 100, head)) for _ in range(3))
    low, scale = low_scales(rng, 1, 8), 3 / (43 * 43 * head**0.5)
    out = run_attention(q, k, v, NO_MASK, low, 8, 1 / 127, scale, "fp16", TILES[tile])
    assert_attended(out, q, k, v, low, 8, np.float32(1 / 127), np.float32(scale), "fp16")


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [300, pytest.param(1024, marks=pytest.mark.full)])
def test_attention_over_many_tokens(tokens):
    rng = np.random.default_rng(0)
    q, k, v = (codes(rng, (2, 1, tokens, 72)) for _ in range(3))
    low, scale = low_scales(rng, 2, 8), 3 / (43 * 43 * 72**0.5)
    out = run_attention(q, k, v, NO_MASK, low, 8, 1 / 127, scale, "fp16")
    assert_attended(out, q, k, v, low, 8, np.float32(1 / 127), np.float32(scale), "fp16")


@pytest.mark.slow
@pytest.mark.parametrize("numerators", [False, True])
@pytest.mark.parametrize("keys", [1000, pytest.param(4096, marks=pytest.mark.full), 32_760])
def test_few_queries_over_many_keys(keys, numerators):
    rng = np.random.default_rng(0)
    q, k, v = (codes(rng, (1, 1, n, 72)) for n in (5, keys, keys))
    low, scale = low_scales(rng, 1, 8), 5 / (43 * 43 * 72**0.5)
    blocks = Blocks(16, 4096, 4, 1) if keys > 4096 else None  # fewer tiles than on a GPU: the interpreter is slow
    out = run_attention(q, k, v, NO_MASK, low, 8, 1 / 127, scale, "fp16", blocks, numerators)
    assert_attended(out, q, k, v, low, 8, np.float32(1 / 127), np.float32(scale), "fp16", numerators=numerators)


@pytest.mark.parametrize("floats", PRODUCT_TYPES)
@pytest.mark.parametrize("code", [0.5, 1.5, 2.5, 5.5, 96.5])
@pytest.mark.parametrize("blocks", [None, Blocks(16, 16, 4, 2)])
def test_ties_of_attention_round_to_even(code, blocks, floats):
    """64 equal scores give p = 1/64 exactly; with the unit matrix for v the output is the codes themselves."""
    q, k, v = np.zeros((1, 1, 5, 64)), np.ones((1, 1, 64, 64)), np.eye(64)[None, None]
    low = np.array([1 / 64 / code], np.float32)
    assert np.float32(1) / low[0] == 64 * code  # what the kernel multiplies by
    assert np.float32(1 / 64) / low[0] == np.float32(code)  # as the reference divides
    out = run_attention(q, k, v, NO_MASK, low, 8, 1 / 127, 1.0, floats, blocks)
    np.testing.assert_allclose(out, np.round(code) * low[0], rtol=PRECISION[floats])


@pytest.mark.parametrize("key", [7, 79])
@pytest.mark.parametrize("blocks", TILES.values(), ids=TILES)
def test_attention_to_one_key(blocks, key):
    """Scores so far apart that one key takes all: its value comes out, and a NaN in q stays in its own row."""
    rng = np.random.default_rng(0)
    q, v = np.ones((1, 1, 40, 16), np.float32), codes(rng, (1, 1, 80, 16))
    k = np.zeros((1, 1, 80, 16), np.float32)
    k[:, :, key] = 100
    q[0, 0, 3, 0] = np.nan
    out = run_attention(q, k, v, NO_MASK, np.array([1 / 127], np.float32), 8, 1 / 127, 1.0, "fp16", blocks)
    assert np.isnan(out[0, 0, 3]).all()
    np.testing.assert_array_equal(np.delete(out, 3, axis=2), np.broadcast_to(v[:, :, [key]], (1, 1, 39, 16)))


def test_the_float32_attention_equals_its_reference():
    rng = np.random.default_rng(0)
    q, k, v = (codes(rng, (2, 2, 50, 72)) for _ in range(3))
    low, scale = low_scales(rng, 2, 8), 3 / (43 * 43 * 72**0.5)
    out = run_attention(q, k, v, NO_MASK, low, 8, 1 / 127, scale)
    expected = multi_region_attention(q, k, v, NO_MASK, low, 8, 1 / 127, scale)
    # a flipped code moves all of a row's outputs by a step times v
    moved = (np.abs(out - expected) > 1e-5 * np.abs(expected).max()).any(-1)
    assert moved.mean() <= 50 * 1e-4 + 0.005


def test_sizes_beyond_the_kernels_are_refused():
    with pytest.raises(UsageError, match=r"Softmax over 1048577 tokens: .* 1\.\.1048576\. Build with --no-plugins"):
        softmax_kernel("fp32", MAX_TOKENS + 1, 8, 1 / 127)
    with pytest.raises(UsageError, match="MultiRegionNumerator over 1048577 tokens"):
        softmax_kernel("fp32", MAX_TOKENS + 1, 8, 1 / 127, numerators=True)
    with pytest.raises(UsageError, match="MultiRegionNumeratorAttention with heads of 64 over 10 x 1048577 tokens"):
        attention_kernel("fp16", 10, MAX_TOKENS + 1, 64, 8, 1 / 127, numerators=True)
    with pytest.raises(UsageError, match="heads of 129 over 10 x 10 tokens"):
        attention_kernel("fp16", 10, 10, 129, 8, 1 / 127)
    with pytest.raises(UsageError, match="scale 0: its kernel takes a positive one"):
        attention_launch(attention_kernel("fp16", 10, 10, 64, 8, 1 / 127), 1, 1, 1, scale=0)
