"""Graphs as ONNX text for the tests of the lint."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper, parser

from tqdit.lint import Finding, lint

CONSTANTS = "int8 zero = {0}, float s = {0.02}, float ws = {0.01}"
QUANTIZED = """
  [q] a = QuantizeLinear(x, s, zero)
  [dq] b = DequantizeLinear(a, s, zero)
  [weight] c = DequantizeLinear(w, ws)
  [product] y = MatMul(b, c)
"""
FUNCTION = '<domain: "tqdit", opset_import: ["" : 20]> twice (a) => (b) { [add] b = Add(a, a) }'


def vector(name: str, count: int, number: object = 0.01, kind: str = "float") -> str:
    """An initializer of equal numbers, as text."""
    return f"{kind}[{count}] {name} = {{{', '.join([str(number)] * count)}}}"


def weight(name: str, shape: tuple[int, ...], dtype: type = np.int8) -> onnx.TensorProto:
    """An initializer too large to write down."""
    numbers = np.random.default_rng(0).integers(0, 127, shape) - (0 if dtype is np.uint8 else 63)
    return numpy_helper.from_array(numbers.astype(dtype), name)


def graph(
    body: str,
    constants: str = CONSTANTS,
    inputs: str = "float[2, 64] x",
    outputs: str = "float[2, 32] y",
    opset: int = 20,
    functions: str = "",
    weights: tuple[onnx.TensorProto, ...] = (weight("w", (64, 32)),),
    ir: int = 10,
) -> ModelProto:
    model = parser.parse_model(
        f'<ir_version: {ir}, opset_import: ["" : {opset}, "tqdit" : 1]>\n'
        f"g ({inputs}) => ({outputs}) <{constants}> {{ {body} }}\n{functions}"
    )
    model.graph.initializer.extend(weights)
    return model


def found(model: ModelProto, backend: str | None = None) -> list[tuple[str, str]]:
    """(rule, node) of each finding."""
    return [(finding.rule, finding.node) for finding in lint(model, backend)]


def only(model: ModelProto, backend: str | None = None) -> Finding:
    """The one finding that there is."""
    findings = lint(model, backend)
    assert len(findings) == 1, [str(finding) for finding in findings]
    return findings[0]
