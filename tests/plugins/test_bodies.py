"""The function bodies in ONNX Runtime equal their NumPy references, and onnx's own inliner keeps them so."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from kernel_device import regions, run_attention, run_numerator, run_softmax
from op_bodies import run
from tqdit.plugins.multi_region_attention import schema as attention_schema
from tqdit.plugins.multi_region_attention.reference import multi_region_attention
from tqdit.plugins.multi_region_numerator import schema as numerator_schema
from tqdit.plugins.multi_region_numerator.reference import multi_region_numerator
from tqdit.plugins.multi_region_numerator_attention import schema as numerator_attention_schema
from tqdit.plugins.multi_region_numerator_attention.reference import multi_region_numerator_attention
from tqdit.plugins.multi_region_softmax import schema as softmax_schema
from tqdit.plugins.multi_region_softmax.reference import multi_region_softmax
from tqdit.plugins.time_group_select import schema as select_schema
from tqdit.plugins.time_group_select.reference import time_group_select


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_time_group_select_equals_its_reference(data):
    boundaries = np.array(sorted(data.draw(st.sets(st.integers(1, 999), max_size=9))), np.int64)
    timestep = np.array(data.draw(st.lists(st.integers(0, 999), min_size=1, max_size=6)), np.int64)
    trailing = data.draw(st.sampled_from([(), (1, 1), (3,)]))
    table = np.random.default_rng(0).standard_normal((len(boundaries) + 1, *trailing), np.float32)
    inputs = {"timestep": timestep, "boundaries": boundaries, "table": table}
    expected = time_group_select(timestep, boundaries, table)
    np.testing.assert_array_equal(run(select_schema, inputs, {}, rank=expected.ndim), expected)


def test_a_timestep_on_a_boundary_takes_the_later_group():
    table = np.arange(3, dtype=np.float32)
    selected = time_group_select(np.array([0, 99, 100, 101, 200, 999]), np.array([100, 200]), table)
    assert selected.tolist() == [0, 0, 1, 1, 2, 2]


def random_scores(bits, rows):
    """Scores (3, 2, 16, 16), low scales (rows,) and the high scale."""
    rng = np.random.default_rng(bits)
    high = 1 / (2 ** (bits - 1) - 1)
    scores = rng.normal(0, 3, (3, 2, 16, 16)).astype(np.float32)
    return scores, (high * 2.0 ** -rng.integers(0, bits, rows)).astype(np.float32), high


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows", [1, 3])
def test_multi_region_softmax_equals_its_reference(bits, rows, inline):
    """The two softmaxes may differ in the last bit and so flip a code at a tie: one in ten thousand is allowed."""
    scores, low_scale, high = random_scores(bits, rows)
    out = run(
        softmax_schema, {"scores": scores, "low_scale": low_scale}, {"bits": bits, "high_scale": high}, inline=inline
    )
    expected = multi_region_softmax(scores, low_scale, bits, high)
    assert (np.abs(out - expected) > 1e-6).mean() <= 1e-4


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows", [1, 3])
def test_multi_region_numerator_equals_its_reference(bits, rows, inline):
    """The body divides probabilities by the largest, the reference takes exponentials: the last bits differ."""
    scores, low_scale, high = random_scores(bits, rows)
    scores[..., :3] = -1e30  # masked
    inputs, attributes = {"scores": scores, "low_scale": low_scale}, {"bits": bits, "high_scale": high}
    out, reciprocals = run(numerator_schema, inputs, attributes, inline=inline, outputs=2)
    expected, sums = multi_region_numerator(scores, low_scale, bits, high)
    assert (np.abs(out - expected) > 1e-6).mean() <= 5e-4
    np.testing.assert_allclose(reciprocals, sums, rtol=1e-6)
    assert (out[..., :3] == 0).all()
    assert (out.max(-1) == np.float32(high) * np.float32(2 ** (bits - 1) - 1)).all()  # the largest numerator is 1


def test_extreme_scores():
    """All equal, one-hot, masked; a row of -inf gives NaN as Softmax does."""
    scores = np.zeros((1, 1, 4, 4), np.float32)
    scores[0, 0, 1] = [0, 50, 0, 0]
    scores[0, 0, 2, :2] = -np.inf
    scores[0, 0, 3] = -np.inf
    inputs = {"scores": scores, "low_scale": np.array([1 / 127 / 8], np.float32)}
    out = run(softmax_schema, inputs, {"bits": 8, "high_scale": 1 / 127})[0, 0]
    np.testing.assert_allclose(out[0], 32 / 127, rtol=1e-6)  # 0.25 in steps of 1/127 is 31.75
    np.testing.assert_allclose(out[1], [0, 1, 0, 0], atol=1e-7)
    np.testing.assert_allclose(out[2], [0, 0, 64 / 127, 64 / 127], rtol=1e-6)  # 63.5 rounds to even
    assert np.isnan(out[3]).all()


def attention_case(bits, rows=3, head=24, tokens=17):
    """Integer codes, as the exporter hands them over."""
    rng = np.random.default_rng(bits)
    q, k, v = (rng.integers(-100, 101, (3, 2, tokens, head)).astype(np.float32) for _ in range(3))
    high = 1 / (2 ** (bits - 1) - 1)
    low_scale = (high * 2.0 ** -rng.integers(0, bits, rows)).astype(np.float32)
    mask = np.where(rng.random((3, 1, 1, tokens)) < 0.3, -1e38, rng.normal(0, 1, (3, 1, 1, tokens))).astype(np.float32)
    inputs = {"q": q, "k": k, "v": v, "mask": mask, "low_scale": low_scale}
    return inputs, {"bits": bits, "high_scale": high, "scale": 2e-4}


ATTENTIONS = {
    "probabilities": (attention_schema, multi_region_attention),
    "numerators": (numerator_attention_schema, multi_region_numerator_attention),
}
attentions = pytest.mark.parametrize("values", ATTENTIONS)


def assert_attends(out, inputs, attributes, values="probabilities", precision=2e-6):
    """A code may differ where its quotient lies at a rounding tie."""
    q, k, v = (inputs[name].astype(np.float64) for name in "qkv")
    scores = q @ k.swapaxes(-1, -2) * np.float32(attributes["scale"]) + np.maximum(inputs["mask"], -1e30)
    scales = inputs["low_scale"], attributes["bits"], np.float32(attributes["high_scale"])
    p, off = regions(scores, *scales, numerators=values == "numerators")
    assert (np.abs(out - p @ v) <= precision * (p @ np.abs(v)) + 1.001 * (off @ np.abs(v)) + 1e-6).all()
    assert (off > 0).mean() < 0.02


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows", [1, 3])
@attentions
def test_the_attention_bodies_equal_their_references(values, bits, rows, inline):
    schema, reference = ATTENTIONS[values]
    inputs, attributes = attention_case(bits, rows)
    assert_attends(reference(**inputs, **attributes), inputs, attributes, values)
    assert_attends(run(schema, inputs, attributes, inline=inline), inputs, attributes, values)


@attentions
def test_the_attention_bodies_take_float16_and_compute_in_float32(values):
    inputs, attributes = attention_case(8)
    small = {name: value.astype(np.float16) if name in "qkv" else value for name, value in inputs.items()}
    out = run(ATTENTIONS[values][0], small, attributes, out_kind=TensorProto.FLOAT16)
    assert out.dtype == np.float16
    assert_attends(out.astype(np.float32), inputs, attributes, values, precision=2**-10)


@attentions
@pytest.mark.parametrize("bits", range(2, 9))
def test_kernels_equal_the_bodies(bits, values):
    """Both have the reference's tolerance; together they may differ in the codes at ties alone."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 and Arm only")
    inputs, attributes = attention_case(bits)
    body = run(ATTENTIONS[values][0], inputs, attributes)
    numerators = values == "numerators"
    kernel = run_attention(*inputs.values(), bits, attributes["high_scale"], attributes["scale"], numerators=numerators)
    moved = (np.abs(body - kernel) > 1e-5 * np.abs(body).max()).any(axis=-1)
    assert moved.mean() <= 0.02  # rows of queries with a flipped code
    scores = np.random.default_rng(0).normal(0, 3, (3, 2, 16, 16)).astype(np.float32)
    low_scale, high = inputs["low_scale"], attributes["high_scale"]
    attributes = {"bits": bits, "high_scale": high}
    if numerators:
        body = run(numerator_schema, {"scores": scores, "low_scale": low_scale}, attributes, outputs=2)
        for of_body, of_kernel in zip(body, run_numerator(scores, low_scale, bits, high), strict=True):
            assert (np.abs(of_body - of_kernel) > 1e-6).mean() <= 1e-3
        return
    body = run(softmax_schema, {"scores": scores, "low_scale": low_scale}, attributes)
    assert (np.abs(body - run_softmax(scores, low_scale, bits, high)) > 1e-6).mean() <= 1e-3
