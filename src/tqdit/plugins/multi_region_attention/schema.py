"""MultiRegionAttention(q T[B,H,N,d], k, v T[B,H,M,d], mask float[B,H,N,M], low_step float[B]; bits, high_step, scale)
-> T[B,H,N,d].

T is float, float16 or bfloat16; the body computes in float32.
"""

from __future__ import annotations

import onnx

from tqdit.plugins.function import parse_body

OP_TYPE = "MultiRegionAttention"

BODY = """
<domain: "tqdit", opset_import: ["" : 20]>
MultiRegionAttention <bits, high_step, scale> (q, k, v, mask, low_step) => (attended)
{
    q_float = Cast <to: int = 1> (q)
    k_float = Cast <to: int = 1> (k)
    v_float = Cast <to: int = 1> (v)
    k_columns = Transpose <perm: ints = [0, 1, 3, 2]> (k_float)
    product = MatMul (q_float, k_columns)
    factor = Constant <value_float: float = @scale> ()
    scaled = Mul (product, factor)
    least = Constant <value_float: float = -1e30> ()
    finite_mask = Max (mask, least)
    scores = Add (scaled, finite_mask)
    p = Softmax <axis: int = -1> (scores)
    shape = Constant <value_ints: ints = [-1, 1, 1, 1]> ()
    s1 = Reshape (low_step, shape)
    s2 = Constant <value_float: float = @high_step> ()
    one = Constant <value_float: float = 1.0> ()
    two = Constant <value_float: float = 2.0> ()
    bit_count = Constant <value_int: int = @bits> ()
    bits_float = Cast <to: int = 1> (bit_count)
    bits_less = Sub (bits_float, one)
    half_range = Pow (two, bits_less)
    top = Sub (half_range, one)
    low_exact = Div (p, s1)
    low_code = Round (low_exact)
    low = Mul (low_code, s1)
    high_exact = Div (p, s2)
    high_rounded = Round (high_exact)
    high_code = Min (high_rounded, top)
    high = Mul (high_code, s2)
    is_low = LessOrEqual (low_code, top)
    probabilities = Where (is_low, low, high)
    attended_float = MatMul (probabilities, v_float)
    attended = CastLike (attended_float, q)
}
"""


def body(opset: int = 20) -> onnx.FunctionProto:
    return parse_body(BODY, opset)
