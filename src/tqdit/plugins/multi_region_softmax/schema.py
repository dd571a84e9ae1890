"""MultiRegionSoftmax(scores float[B,H,N,M], low_step float[B]; bits, high_step) -> float[B,H,N,M]."""

from __future__ import annotations

import onnx

from tqdit.plugins.function import parse_body

OP_TYPE = "MultiRegionSoftmax"

BODY = """
<domain: "tqdit", opset_import: ["" : 20]>
MultiRegionSoftmax <bits, high_step> (scores, low_step) => (probabilities)
{
    p = Softmax <axis: int = -1> (scores)
    shape = Constant <value_ints: ints = [-1, 1, 1, 1]> ()
    s1 = Reshape (low_step, shape)
    s2 = Constant <value_float: float = @high_step> ()
    one = Constant <value_float: float = 1.0> ()
    two = Constant <value_float: float = 2.0> ()
    k = Constant <value_int: int = @bits> ()
    k_float = Cast <to: int = 1> (k)
    k_less = Sub (k_float, one)
    q = Pow (two, k_less)
    top = Sub (q, one)
    low_exact = Div (p, s1)
    low_code = Round (low_exact)
    low = Mul (low_code, s1)
    high_exact = Div (p, s2)
    high_rounded = Round (high_exact)
    high_code = Min (high_rounded, top)
    high = Mul (high_code, s2)
    is_low = LessOrEqual (low_code, top)
    probabilities = Where (is_low, low, high)
}
"""


def body(opset: int = 20) -> onnx.FunctionProto:
    return parse_body(BODY, opset)
