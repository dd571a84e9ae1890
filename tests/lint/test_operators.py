"""Operators and integer types that TensorRT refuses."""

import pytest

from lint_graphs import CONSTANTS, QUANTIZED, found, graph, only, vector

OPERATORS = [
    ("a, s1, z1 = DynamicQuantizeLinear(x)", "float[2, 64] x", "uint8[2, 64] a"),
    ("y = MatMulInteger(x, w)", "int8[2, 64] x", "int32[2, 32] y"),
    ("y = QLinearMatMul(x, s, zero, w, ws, zero, s, zero)", "int8[2, 64] x", "int8[2, 32] y"),
    ("y = QLinearConv(x, s, zero, w, ws, zero, s, zero)", "int8[2, 64] x", "int8[2, 32] y"),
]


@pytest.mark.parametrize(("line", "inputs", "outputs"), OPERATORS)
def test_operators_that_hold_the_integers_themselves_are_an_error(line, inputs, outputs):
    model = graph("[op] " + line, inputs=inputs, outputs=outputs)
    finding = only(model)
    assert (finding.rule, finding.severity, finding.node) == ("operator", "error", "op")
    assert "QuantizeLinear -> DequantizeLinear" in finding.remedy
    assert found(model, "onnxruntime") == []


BIAS = QUANTIZED.replace("y = MatMul", "p = MatMul")


def test_an_int32_bias_through_dequantize_linear_is_an_error():
    body = BIAS + "[bias] d = DequantizeLinear(i, s) y = Add(p, d)"
    assert found(graph(body, CONSTANTS + "," + vector("i", 32, 1, "int32"))) == [("operator", "bias")]


def test_a_float_bias_passes():
    assert found(graph(BIAS + "y = Add(p, i)", CONSTANTS + "," + vector("i", 32, 0.5))) == []


@pytest.mark.parametrize(("kind", "expected"), [("uint4", [("operator", "d")]), ("int4", [])])
def test_uint4_is_an_error_and_int4_is_not(kind, expected):
    body = "[d] c = DequantizeLinear(w4, ws) y = MatMul(x, c)"
    model = graph(body, inputs="float[2, 2] x", outputs="float[2, 2] y", opset=21, weights=())
    from onnx import TensorProto, helper

    model.graph.initializer.append(helper.make_tensor("w4", getattr(TensorProto, kind.upper()), [2, 2], [1, 2, 3, 4]))
    assert found(model) == expected
