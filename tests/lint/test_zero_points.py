"""uint8, zero points other than 0, and missing ones."""

import numpy as np

from lint_graphs import CONSTANTS, QUANTIZED, found, graph, only, weight

PAIR = "[q] a = QuantizeLinear(x, s, zero) [dq] y = DequantizeLinear(a, s, zero)"
SAME = {"outputs": "float[2, 64] y"}


def test_uint8_is_an_error_for_tensorrt_and_fine_elsewhere():
    model = graph(PAIR, "uint8 zero = {0}, float s = {0.02}", **SAME)
    assert found(model) == [("zero-point", "q"), ("zero-point", "dq")]
    assert found(model, "tensorrt") == found(model)
    assert found(model, "onnxruntime") == []


def test_quantize_linear_without_a_zero_point_is_uint8():
    model = graph("[q] a = QuantizeLinear(x, s) [dq] y = DequantizeLinear(a, s)", "float s = {0.02}", **SAME)
    findings = found(model)
    assert findings == [("zero-point", "q"), ("zero-point", "dq")]


def test_dequantize_linear_of_int8_needs_no_zero_point():
    assert found(graph(QUANTIZED)) == []  # its weight has none


def test_an_output_type_of_int8_without_a_zero_point_is_an_error_for_onnxruntime():
    body = "[q] a = QuantizeLinear<output_dtype = 3>(x, s) [dq] y = DequantizeLinear(a, s)"
    finding = only(graph(body, "float s = {0.02}", opset=21, **SAME))
    assert (finding.node, finding.backends) == ("q", ("onnxruntime",))


def test_a_uint8_initializer_is_refused_by_tensorrt():
    finding = only(graph(QUANTIZED, weights=(weight("w", (64, 32), np.uint8),)))
    assert finding.node == "weight"
    assert "refuses uint8 initializers" in finding.message


def test_a_zero_point_other_than_zero_is_an_error():
    model = graph(PAIR, "int8 zero = {3}, float s = {0.02}", **SAME)
    assert found(model) == [("zero-point", "q"), ("zero-point", "dq")]
    assert found(model, "openvino") == []


def test_one_zero_point_of_many_is_enough():
    constants = CONSTANTS + ", int8[2] zeros = {0, 1}, float[2] scales = {0.1, 0.1}, int8[2, 2] k = {1, 2, 3, 4}"
    model = graph("[k] d = DequantizeLinear<axis = 1>(k, scales, zeros) y = MatMul(x, d)", constants, "float[2, 2] x",
                  "float[2, 2] y")  # fmt: skip
    assert found(model) == [("zero-point", "k")]


def test_a_zero_point_at_run_time_is_an_error():
    model = graph(PAIR.replace("zero", "o"), inputs="float[2, 64] x, int8 o", **SAME)
    assert found(model) == [("zero-point", "q"), ("zero-point", "dq")]
