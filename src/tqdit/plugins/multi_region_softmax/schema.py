"""MultiRegionSoftmax(scores float[B,H,N,M], low_step float[B]; bits, high_step) -> float[B,H,N,M]."""

from __future__ import annotations

import onnx

from tqdit.plugins.function import parse_body

OP_TYPE = "MultiRegionSoftmax"

# Values `p` in 0..1 to two regions. Each element first gets the step of its region, then is rounded once: the same bits
# as rounding it in both regions and choosing: half the time in ONNX Runtime, whose Where is slow. Low steps are at most
# the high one.
IN_TWO_REGIONS = """
    shape = Constant <value_ints: ints = [-1, 1, 1, 1]> ()
    s1 = Reshape (low_step, shape)
    s2 = Constant <value_float: float = @high_step> ()
    one = Constant <value_float: float = 1.0> ()
    half = Constant <value_float: float = 0.5> ()
    two = Constant <value_float: float = 2.0> ()
    bit_count = Constant <value_int: int = @bits> ()
    bits_float = Cast <to: int = 1> (bit_count)
    bits_less = Sub (bits_float, one)
    half_range = Pow (two, bits_less)
    top = Sub (half_range, one)
    bound = Sub (half_range, half)
    low_exact = Div (p, s1)
    is_high = GreaterOrEqual (low_exact, bound)
    high_mask = Cast <to: int = 1> (is_high)
    high_step_or_zero = Mul (high_mask, s2)
    step = Max (high_step_or_zero, s1)
    exact = Div (p, step)
    rounded = Round (exact)
    code = Min (rounded, top)
    quantized = Mul (code, step)
"""
PROBABILITIES = f"""
    p = Softmax <axis: int = -1> (scores)
{IN_TWO_REGIONS}
"""
BODY = f"""
<domain: "tqdit", opset_import: ["" : 20]>
MultiRegionSoftmax <bits, high_step> (scores, low_step) => (quantized)
{{
{PROBABILITIES}
}}
"""


def body(opset: int = 20) -> onnx.FunctionProto:
    return parse_body(BODY, opset)
