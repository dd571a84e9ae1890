"""Several scales: on the output channels of weights and nowhere else."""

import pytest

from lint_graphs import CONSTANTS, QUANTIZED, found, graph, only, vector, weight

SCALES = ", ".join([CONSTANTS, vector("rows", 64), vector("columns", 32), vector("zeros", 64, 0, "int8")])
DQ = "[q] a = QuantizeLinear(x, s, zero) [dq] b = DequantizeLinear(a, s, zero) "


def product(line, shape=(64, 32), **options):
    return graph(DQ + line, SCALES, weights=(weight("w", shape),), **options)


RIGHT = [
    ("c = DequantizeLinear<axis = 1>(w, columns) y = MatMul(b, c)", (64, 32)),
    ("c = DequantizeLinear<axis = -1>(w, columns) y = MatMul(b, c)", (64, 32)),
    ("c = DequantizeLinear<axis = 0>(w, columns) d = Transpose(c) y = MatMul(b, d)", (32, 64)),
    ("c = DequantizeLinear<axis = 1>(w, columns) y = Gemm(b, c)", (64, 32)),
    ("c = DequantizeLinear<axis = 0>(w, columns) y = Gemm<transB = 1>(b, c)", (32, 64)),
]
WRONG = [
    ("c = DequantizeLinear<axis = 0>(w, rows) y = MatMul(b, c)", (64, 32)),
    ("c = DequantizeLinear<axis = -2>(w, rows) y = MatMul(b, c)", (64, 32)),
    ("c = DequantizeLinear<axis = 1>(w, rows) d = Transpose(c) y = MatMul(b, d)", (32, 64)),
    ("c = DequantizeLinear<axis = 0>(w, rows) y = Gemm(b, c)", (64, 32)),
    ("c = DequantizeLinear<axis = 1>(w, rows) y = Gemm<transB = 1>(b, c)", (32, 64)),
]


@pytest.mark.parametrize(("line", "shape"), RIGHT)
def test_scales_of_output_channels_pass(line, shape):
    assert found(product(line, shape)) == []


@pytest.mark.parametrize(("line", "shape"), WRONG)
def test_scales_of_input_channels_are_an_error(line, shape):
    finding = only(product("[weight] " + line, shape))
    assert (finding.rule, finding.severity, finding.node) == ("scale-axis", "error", "weight")
    assert "output channels" in finding.message


@pytest.mark.parametrize(("axis", "scales", "expected"), [(0, "columns", []), (1, "rows", [("scale-axis", "weight")])])
def test_a_convolutions_output_channels_are_axis_0(axis, scales, expected):
    body = f"[weight] c = DequantizeLinear<axis = {axis}>(w, {scales}) y = Conv(b, c)"
    options = {"inputs": "float[2, 64, 4, 4] x", "outputs": "float[2, 32, 4, 4] y"}
    assert found(product(body, (32, 64, 1, 1), **options)) == expected


def test_a_single_scale_in_one_dimension_is_one_for_the_tensor():
    one = DQ + "c = DequantizeLinear<axis = 0>(w, one) y = MatMul(b, c)"
    assert found(graph(one, CONSTANTS + ", float[1] one = {0.5}")) == []


def test_as_many_scales_as_the_axis_has():
    finding = only(product("[weight] c = DequantizeLinear<axis = 1>(w, rows) y = MatMul(x, c)"))
    assert "64 scales for axis 1, which has 32 entries" in finding.message


def test_scales_per_channel_of_an_activation_are_an_error():
    body = QUANTIZED.replace("(x, s, zero)", "(x, rows, zeros)").replace("(a, s, zero)", "(a, rows, zeros)")
    model = graph(body, SCALES)
    assert found(model) == [("scale-axis", "q"), ("scale-axis", "dq")]
    assert found(model, "openvino") == []


def test_blocked_scales_of_an_activation_are_an_error():
    blocks = CONSTANTS + ", float[2, 1] tokens = {0.1, 0.2}, int8[2, 1] z2 = {0, 0}"
    body = "[q] a = QuantizeLinear<block_size = 64>(x, tokens, z2) y = DequantizeLinear(a, s, zero)"
    assert found(graph(body, blocks, outputs="float[2, 64] y", opset=21)) == [("scale-axis", "q")]


def test_a_function_that_dequantizes_is_looked_through():
    function = (
        '<domain: "tqdit", opset_import: ["" : 20]> dequantize (q, k) => (d) { d = DequantizeLinear<axis = 0>(q, k) }'
    )
    body = DQ + "c = tqdit.dequantize(w, rows) y = MatMul(b, c)"
    model = graph(body, SCALES, functions=function)
    assert found(model, "onnxruntime") == [("scale-axis", "dequantize/DequantizeLinear -> d")]
