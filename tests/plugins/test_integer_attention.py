"""Attention of int8 codes: its kernel and its bodies equal the NumPy references.

Tolerances are those of test_kernels.py and test_bodies.py: where a quotient lies at a rounding tie two codes are right.
An int8 result is the rounded result, so it is at most half a scale away from the float one.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from kernel_device import DEVICE, NO_MASK, regions, run_integer_attention
from op_bodies import run
from tqdit.errors import UsageError
from tqdit.plugins.multi_region_attention.launch import Blocks
from tqdit.plugins.multi_region_integer_attention import launch as attention
from tqdit.plugins.multi_region_integer_attention import schema as integer_schema
from tqdit.plugins.multi_region_integer_attention.reference import multi_region_integer_attention
from tqdit.plugins.multi_region_numerator_integer_attention import schema as numerator_schema
from tqdit.plugins.multi_region_numerator_integer_attention.reference import multi_region_numerator_integer_attention

OPS = {
    "probabilities": (integer_schema, multi_region_integer_attention),
    "numerators": (numerator_schema, multi_region_numerator_integer_attention),
}
ops = pytest.mark.parametrize("values", OPS)
OUT_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "i8": TensorProto.INT8}
PRECISION = {"fp32": 2e-6, "fp16": 2**-10, "i8": 2e-6}
TILES = {
    "in one tile": Blocks(16, 128, 4, 1),
    "in two tiles": Blocks(64, 64, 4, 1),
    "computed twice": Blocks(32, 32, 4, 2),
}
tiles = pytest.mark.parametrize("blocks", TILES.values(), ids=TILES)


@pytest.fixture(autouse=True, scope="module")
def _triton():
    pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 and Arm only")


def high_scale(bits, whole_range=True):
    q = 2 ** (bits - 1)
    return 1 / (q - 1 if whole_range else q)


def make_case(rng, images=2, heads=2, queries=40, keys=50, head=72, bits=8, rows=None, any_step=True):
    """Inputs by name. `rows` entries of the values of an image, 1 or `images`; scores of standard deviation 3."""
    rows = rows or images
    q, k = (np.clip(rng.normal(0, 43, (images, heads, n, head)).round(), -128, 127) for n in (queries, keys))
    v = rng.integers(-128, 128, (images, heads, head, keys))
    exponent = rng.uniform(0, bits - 1, rows) if any_step else rng.integers(0, bits, rows)
    return {
        "q": q.astype(np.int8), "k": k.astype(np.int8), "v": v.astype(np.int8), "mask": NO_MASK,
        "scale": (rng.uniform(1, 3, rows) / (43 * 43 * head**0.5)).astype(np.float32),
        "low_scale": (high_scale(bits) * 2.0**-exponent).astype(np.float32),
        "out_scale": rng.uniform(0.3, 2, rows).astype(np.float32),
        "out_shift": rng.uniform(-50, 50, rows).astype(np.float32),
    }  # fmt: skip


def assert_attended(out, inputs, bits, high, kind="fp32", numerators=False):
    q, k, v = (inputs[name].astype(np.float64) for name in "qkv")
    scale, out_scale, out_shift = (
        inputs[name].astype(np.float64).reshape(-1, 1, 1, 1) for name in ("scale", "out_scale", "out_shift")
    )
    v = v.swapaxes(-1, -2)
    scores = q @ k.swapaxes(-1, -2) * scale + np.maximum(inputs["mask"], -1e30)
    p, off = regions(scores, inputs["low_scale"], bits, np.float32(high), numerators)
    exact = p @ v * out_scale + out_shift
    bound = PRECISION[kind] * (p @ np.abs(v) * out_scale + np.abs(out_shift)) + 1.001 * (off @ np.abs(v)) * out_scale
    if kind == "i8":
        exact, bound = np.clip(exact, -128, 127), bound + 0.5
        np.testing.assert_array_equal(out, np.round(out))
    assert (np.abs(out - exact) <= bound + 1e-5).all()
    assert (off > 0).mean() < 0.02  # nearly everything is compared


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_kernel(data):
    images, heads, head = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 100))
    queries, keys, bits = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 90)), data.draw(st.integers(2, 8))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = data.draw(st.sampled_from([1, images]))
    inputs = make_case(rng, images, heads, queries, keys, head, bits, rows, data.draw(st.booleans()))
    high, kind = high_scale(bits, data.draw(st.booleans())), data.draw(st.sampled_from(list(OUT_TYPES)))
    blocks, numerators = data.draw(st.sampled_from([None, *TILES.values()])), data.draw(st.booleans())
    out = run_integer_attention(inputs, bits, high, kind, blocks, numerators)
    assert_attended(out, inputs, bits, high, kind, numerators)


@tiles
@pytest.mark.parametrize("numerators", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 40, 50), (1, 2, 1, 50), (2, 1, 1, 50), (1, 1, 40, 50), (2, 1, 40, 1)])
def test_a_mask_with_any_axis_of_length_one(shape, numerators, blocks):
    rng = np.random.default_rng(0)
    mask = np.where(rng.random(shape) < 0.5, -np.inf, rng.normal(0, 1, shape)).astype(np.float32)
    mask[..., 0] = 0.5
    inputs = make_case(rng) | {"mask": mask}
    out = run_integer_attention(inputs, 8, 1 / 127, "fp16", blocks, numerators)
    assert_attended(out, inputs, 8, 1 / 127, "fp16", numerators)


@tiles
@pytest.mark.parametrize("numerators", [False, True])
def test_a_query_that_sees_no_key_has_equal_probabilities(blocks, numerators):
    inputs = make_case(np.random.default_rng(0), 1, 1, 5, 80, 16)
    inputs |= {"mask": np.full((1, 1, 1, 80), -np.inf, np.float32), "out_scale": np.ones(1, np.float32),
               "low_scale": np.array([1 / 127 if numerators else 1 / 80], np.float32)}  # fmt: skip
    out = run_integer_attention(inputs, 8, 1 / 127, "fp32", blocks, numerators)
    mean = inputs["v"].astype(np.float32).mean(-1)[:, :, None] + inputs["out_shift"]
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@tiles
@pytest.mark.parametrize("head", [8, 16, 24, 32, 40, 64, 72, 88, 128])
def test_every_head_size_in_every_tiling(head, blocks):
    inputs = make_case(np.random.default_rng(head), 1, 2, 100, 100, head)
    assert_attended(run_integer_attention(inputs, 8, 1 / 127, "i8", blocks), inputs, 8, 1 / 127, "i8")


@pytest.mark.slow
@pytest.mark.parametrize("numerators", [False, True])
@pytest.mark.parametrize("tokens", [197, 300, pytest.param(1024, marks=pytest.mark.full)])
def test_every_block_shape_that_is_offered(tokens, numerators):
    inputs = make_case(np.random.default_rng(0), 1, 1, 70, tokens)
    for blocks in attention.candidates(72, tokens, large=True):
        out = run_integer_attention(inputs, 8, 1 / 127, "i8", blocks, numerators)
        assert_attended(out, inputs, 8, 1 / 127, "i8", numerators)


@tiles
@pytest.mark.parametrize("ratio", [1, 1.7, 64, 127.3, 5000])
def test_codes_of_both_regions_are_exact_for_any_two_scales(ratio, blocks):
    """The float kernel would round the codes of a ratio that is no power of two, and float16 has no room for 5000."""
    inputs = make_case(np.random.default_rng(0), 1, 1, 20, 90, 32)
    inputs |= {"low_scale": np.array([1 / 127 / ratio], np.float32), "scale": inputs["scale"][:1]}
    assert_attended(run_integer_attention(inputs, 8, 1 / 127, "fp32", blocks), inputs, 8, 1 / 127)


@tiles
@pytest.mark.parametrize("key", [0, 7, 79])
def test_attention_to_one_key(blocks, key):
    """Scores so far apart that one key takes all: its values come out, whichever place the key has in a tile."""
    rng = np.random.default_rng(0)
    q, k = np.ones((1, 1, 40, 16), np.int8), np.zeros((1, 1, 80, 16), np.int8)
    k[:, :, key] = 100
    v = rng.integers(-128, 128, (1, 1, 16, 80)).astype(np.int8)
    one, none = np.ones(1, np.float32), np.zeros(1, np.float32)
    inputs = {"q": q, "k": k, "v": v, "mask": NO_MASK, "scale": one, "low_scale": one / 127 / 8, "out_scale": one,
              "out_shift": none}  # fmt: skip
    out = run_integer_attention(inputs, 8, 1 / 127, "i8", blocks)
    np.testing.assert_array_equal(out, np.broadcast_to(v[:, :, None, :, key], (1, 1, 40, 16)))


def test_an_int8_result_is_rounded_half_to_even_and_clipped():
    """One key, so that the result is its values: times 1/2, and beyond both ends."""
    v = np.array([1, 3, 5, -1, -3, 100, 127, -128], np.int8).reshape(1, 1, 8, 1)
    one = np.ones(1, np.float32)
    inputs = {"q": np.zeros((1, 1, 1, 8), np.int8), "k": np.zeros((1, 1, 1, 8), np.int8), "v": v, "mask": NO_MASK,
              "scale": one, "low_scale": one / 127, "out_scale": one / 2, "out_shift": 0 * one}  # fmt: skip
    for factor, expected in ((0.5, [0, 2, 2, 0, -2, 50, 64, -64]), (2, [2, 6, 10, -2, -6, 127, 127, -128])):
        inputs["out_scale"] = np.float32([factor])
        assert run_integer_attention(inputs, 8, 1 / 127, "i8").ravel().tolist() == expected
        reference = multi_region_integer_attention(**inputs, bits=8, high_scale=1 / 127, out_type=TensorProto.INT8)
        assert reference.ravel().tolist() == expected


def test_the_largest_sum_fits_int32():
    """All numerators are 1, the code 127, and all values -128; one key more than the kernel takes would overflow."""
    keys, one = attention.MAX_KEYS, np.ones(1, np.float32)
    assert 127 * 128 * keys <= np.iinfo(np.int32).max < 127 * 128 * 2 * keys
    inputs = {"q": np.zeros((1, 1, 3, 8), np.int8), "k": np.zeros((1, 1, keys, 8), np.int8),
              "v": np.full((1, 1, 8, keys), -128, np.int8), "mask": NO_MASK, "scale": one, "low_scale": one / 127,
              "out_scale": one, "out_shift": 0 * one}  # fmt: skip
    blocks = Blocks(16, 4096, 4, 1) if DEVICE == "cpu" else None  # fewer tiles: the interpreter is slow
    out = run_integer_attention(inputs, 8, 1 / 127, "fp32", blocks, numerators=True)
    np.testing.assert_allclose(out, -128, rtol=1e-6)


def test_sizes_beyond_the_kernel_are_refused():
    limits = "1..128 and 1..1048576 x 1..131072. Build with --no-plugins"
    with pytest.raises(UsageError, match=rf"IntegerAttention with heads of 64 over 10 x 131073 tokens: .* {limits}"):
        attention.kernel("i8", 10, attention.MAX_KEYS + 1, 64, 8, 1 / 127)
    with pytest.raises(UsageError, match="MultiRegionNumeratorIntegerAttention with heads of 129"):
        attention.kernel("i8", 10, 10, 129, 8, 1 / 127, numerators=True)


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("kind", OUT_TYPES)
@pytest.mark.parametrize("bits", [2, 5, 8])
@ops
def test_the_bodies_equal_their_references_and_the_kernel(values, bits, kind, inline):
    schema, reference = OPS[values]
    rng = np.random.default_rng(bits)
    mask = np.where(rng.random((2, 1, 1, 50)) < 0.3, -1e38, rng.normal(0, 1, (2, 1, 1, 50))).astype(np.float32)
    inputs = make_case(rng, bits=bits, rows=1 if inline else 2) | {"mask": mask}
    high, numerators = high_scale(bits), values == "numerators"
    attributes = {"bits": bits, "high_scale": high, "out_type": OUT_TYPES[kind]}
    body = run(schema, inputs, attributes, inline=inline, out_kind=OUT_TYPES[kind])
    assert body.dtype == {"fp32": np.float32, "fp16": np.float16, "i8": np.int8}[kind]
    kernel = run_integer_attention(inputs, bits, high, kind, numerators=numerators)
    body = body.astype(np.float32)
    for out in (body, reference(**inputs, **attributes).astype(np.float32), kernel):
        assert_attended(out, inputs, bits, high, kind, numerators)
    moved = np.abs(body - kernel) > (0 if kind == "i8" else 2 * PRECISION[kind] * np.abs(body).max())
    assert moved.any(-1).mean() <= 0.02  # rows of queries with a flipped code


@ops
def test_the_bodies_take_the_networks_other_half(values):
    """bfloat16, which NumPy lacks: the body is checked, with its types."""
    import onnx
    from onnx import helper

    from tqdit.plugins import DOMAIN, VERSION

    schema = OPS[values][0]
    names = ["q", "k", "v", "mask", "scale", "low_scale", "out_scale", "out_shift"]
    node = helper.make_node(schema.OP_TYPE, names, ["out"], domain=DOMAIN, bits=8, high_scale=1 / 127,
                            out_type=TensorProto.BFLOAT16)  # fmt: skip
    values_of = [
        helper.make_tensor_value_info(
            name, TensorProto.INT8 if name in "qkv" else TensorProto.FLOAT, [None] * (4 if i < 4 else 1)
        )
        for i, name in enumerate(names)
    ]
    made = [helper.make_tensor_value_info("out", TensorProto.BFLOAT16, [None] * 4)]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    graph = helper.make_graph([node], "g", values_of, made)
    model = helper.make_model(graph, opset_imports=opsets, functions=[schema.body()], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
