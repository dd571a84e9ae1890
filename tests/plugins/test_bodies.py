"""The function bodies in ONNX Runtime equal their NumPy references, and onnx's own inliner keeps them so."""

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tqdit.plugins import DOMAIN, VERSION
from tqdit.plugins.function import PLUGIN_ATTRIBUTES
from tqdit.plugins.multi_region_softmax import schema as softmax_schema
from tqdit.plugins.multi_region_softmax.reference import multi_region_softmax
from tqdit.plugins.time_group_select import schema as select_schema
from tqdit.plugins.time_group_select.reference import time_group_select


def run(schema, inputs, attributes, rank=4, inline=False):
    """One node of a custom op, with its body, in ONNX Runtime without optimisations."""
    node = helper.make_node(schema.OP_TYPE, list(inputs), ["out"], domain=DOMAIN, **attributes, **PLUGIN_ATTRIBUTES)
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    values = [helper.make_tensor_value_info(k, kinds[v.dtype], [None] * v.ndim) for k, v in inputs.items()]
    graph = helper.make_graph(
        [node], "g", values, [helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * rank)]
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[schema.body()], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    if inline:
        model = onnx.inliner.inline_local_functions(model)
        assert not model.functions
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


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


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows", [1, 3])
def test_multi_region_softmax_equals_its_reference(bits, rows, inline):
    """The two softmaxes may differ in the last bit and so flip a code at a tie: one in ten thousand is allowed."""
    rng = np.random.default_rng(bits)
    high = 1 / (2 ** (bits - 1) - 1)
    scores = rng.normal(0, 3, (3, 2, 16, 16)).astype(np.float32)
    low_step = (high * 2.0 ** -rng.integers(0, bits, rows)).astype(np.float32)
    out = run(
        softmax_schema, {"scores": scores, "low_step": low_step}, {"bits": bits, "high_step": high}, inline=inline
    )
    expected = multi_region_softmax(scores, low_step, bits, high)
    assert (np.abs(out - expected) > 1e-6).mean() <= 1e-4


def test_extreme_scores():
    """All equal, one-hot, masked; a row of -inf gives NaN as Softmax does."""
    scores = np.zeros((1, 1, 4, 4), np.float32)
    scores[0, 0, 1] = [0, 50, 0, 0]
    scores[0, 0, 2, :2] = -np.inf
    scores[0, 0, 3] = -np.inf
    inputs = {"scores": scores, "low_step": np.array([1 / 127 / 8], np.float32)}
    out = run(softmax_schema, inputs, {"bits": 8, "high_step": 1 / 127})[0, 0]
    np.testing.assert_allclose(out[0], 32 / 127, rtol=1e-6)  # 0.25 in steps of 1/127 is 31.75
    np.testing.assert_allclose(out[1], [0, 1, 0, 0], atol=1e-7)
    np.testing.assert_allclose(out[2], [0, 0, 64 / 127, 64 / 127], rtol=1e-6)  # 63.5 rounds to even
    assert np.isnan(out[3]).all()
