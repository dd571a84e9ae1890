"""MultiRegionSoftmax(scores float[B,H,N,M], low_scale float[B]; bits, high_scale) -> float[B,H,N,M]."""

from __future__ import annotations

import onnx

from tqdit.plugins.function import parse_body

OP_TYPE = "MultiRegionSoftmax"

# Values `p` in 0..1 to two regions. Each element first gets the scale of its region, then is rounded once: the
# same bits as rounding it in both regions and choosing: half the time in ONNX Runtime, whose Where is slow. Low scales
# are at most the high one.
IN_TWO_REGIONS = """
    shape = Constant <value_ints: ints = [-1, 1, 1, 1]> ()
    s1 = Reshape (low_scale, shape)
    s2 = Constant <value_float: float = @high_scale> ()
    one = Constant <value_float: float = 1.0> ()
    half = Constant <value_float: float = 0.5> ()
    two = Constant <value_float: float = 2.0> ()
    bit_count = Constant <value_int: int = @bits> ()
    bits_float = Cast <to: int = 1> (bit_count)
    bits_less = Sub (bits_float, one)
    half_range = Pow (two, bits_less)
    top = Sub (half_range, one)
    bound = Sub (half_range, half)
    boundary = Mul (s1, bound)
    is_high = GreaterOrEqual (p, boundary)
    high_mask = Cast <to: int = 1> (is_high)
    high_scale_or_zero = Mul (high_mask, s2)
    own_scale = Max (high_scale_or_zero, s1)
    exact = Div (p, own_scale)
    rounded = Round (exact)
    code = Min (rounded, top)
    quantized = Mul (code, own_scale)
"""
PROBABILITIES = f"""
    p = Softmax <axis: int = -1> (scores)
{IN_TWO_REGIONS}
"""
BODY = f"""
<domain: "tqdit", opset_import: ["" : 20]>
MultiRegionSoftmax <bits, high_scale> (scores, low_scale) => (quantized)
{{
{PROBABILITIES}
}}
"""


def body(opset: int = 20) -> onnx.FunctionProto:
    return parse_body(BODY, opset)
