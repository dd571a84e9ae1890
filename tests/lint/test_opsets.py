"""Opsets by what a file uses and by who reads it."""

import numpy as np
import pytest
from onnx import numpy_helper

from lint_graphs import CONSTANTS, QUANTIZED, found, graph, vector
from tqdit.lint import lint

SAME = {"outputs": "float[2, 64] y"}


def nodes(model, severity="error", backend="openvino"):
    return [
        finding.node for finding in lint(model, backend) if finding.rule == "opset" and finding.severity == severity
    ]


@pytest.mark.parametrize(("opset", "expected"), [(19, ["gelu"]), (20, [])])
def test_gelu_begins_at_20(opset, expected):
    assert nodes(graph("[gelu] y = Gelu(x)", opset=opset, **SAME)) == expected


@pytest.mark.parametrize(("opset", "expected"), [(12, ["weight"]), (13, [])])
def test_per_channel_scales_begin_at_13(opset, expected):
    body = QUANTIZED.replace("(w, ws)", "<axis = 1>(w, columns)")
    assert nodes(graph(body, CONSTANTS + "," + vector("columns", 32), opset=opset)) == expected


@pytest.mark.parametrize(("opset", "expected"), [(18, ["q", "dq"]), (19, [])])
def test_float16_scales_begin_at_19(opset, expected):
    body = "[q] a = QuantizeLinear(x, half, zero) [dq] y = DequantizeLinear(a, half, zero)"
    model = graph(body, inputs="float16[2, 64] x", outputs="float16[2, 64] y", opset=opset)
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.01, np.float16), "half"))
    assert nodes(model) == expected


@pytest.mark.parametrize(
    ("opset", "backend", "severity"),
    [
        (26, "onnxruntime", None),
        (27, "onnxruntime", "error"),
        (25, "tensorrt-rtx", None),
        (26, "tensorrt-rtx", "warning"),
        (28, "openvino", None),
    ],
)
def test_each_backend_has_its_limits(opset, backend, severity):
    severities = [finding.severity for finding in lint(graph("y = Relu(x)", opset=opset, **SAME), backend)]
    assert severities == ([severity] if severity else [])


@pytest.mark.parametrize(("opset", "expected"), [(17, 1), (20, 0)])
def test_below_20_is_a_warning(opset, expected):
    assert len(nodes(graph("y = Relu(x)", opset=opset, **SAME), "warning")) == expected


def test_a_function_is_judged_by_its_own_opset():
    function = '<domain: "tqdit", opset_import: ["" : 17]> act (a) => (b) { [gelu] b = Gelu(a) }'
    assert nodes(graph("y = tqdit.act(x)", functions=function, **SAME)) == ["act/gelu"]
    assert found(graph("y = Gelu(x)", **SAME)) == []
