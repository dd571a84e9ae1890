"""MultiRegionIntegerAttention(q int8[B,H,N,d], k int8[B,H,M,d], v int8[B,H,d,M], mask float[B,H,N,M], scale float[B],
low_scale float[B], out_scale float[B], out_shift float[B]; bits, high_scale, out_type) -> out_type[B,H,N,d].

`out_type` is a number of ONNX: FLOAT, FLOAT16, BFLOAT16 or INT8. The body computes in float32. It has no
DequantizeLinear: TensorRT's parser gives those of two calls of a function one name, and refuses the second.
"""

from __future__ import annotations

import onnx

from tqdit.plugins.function import parse_body
from tqdit.plugins.multi_region_softmax.schema import PROBABILITIES

OP_TYPE = "MultiRegionIntegerAttention"

INPUTS = """
    <bits, high_scale, out_type> (q, k, v, mask, scale, low_scale, out_scale, out_shift) => (attended)
"""
MASKED_SCORES = """
    q_float = Cast <to: int = 1> (q)
    k_float = Cast <to: int = 1> (k)
    v_float = Cast <to: int = 1> (v)
    k_columns = Transpose <perm: ints = [0, 1, 3, 2]> (k_float)
    v_rows = Transpose <perm: ints = [0, 1, 3, 2]> (v_float)
    product = MatMul (q_float, k_columns)
    of_image = Constant <value_ints: ints = [-1, 1, 1, 1]> ()
    factor = Reshape (scale, of_image)
    scaled = Mul (product, factor)
    least = Constant <value_float: float = -1e30> ()
    finite_mask = Max (mask, least)
    scores = Add (scaled, finite_mask)
"""
# `attended_float` to the type of the result: codes are rounded and clipped, floats are not.
RESULT = """
    out_factor = Reshape (out_scale, of_image)
    out_offset = Reshape (out_shift, of_image)
    out_scaled = Mul (attended_float, out_factor)
    exact_result = Add (out_scaled, out_offset)
    whole = Round (exact_result)
    least_code = Constant <value_float: float = -128.0> ()
    largest_code = Constant <value_float: float = 127.0> ()
    codes = Clip (whole, least_code, largest_code)
    kind = Constant <value_int: int = @out_type> ()
    int8_kind = Constant <value_int: int = 3> ()
    is_int8 = Equal (kind, int8_kind)
    result = Where (is_int8, codes, exact_result)
    attended = Cast <to: int = @out_type> (result)
"""
BODY = f"""
<domain: "tqdit", opset_import: ["" : 20]>
MultiRegionIntegerAttention {INPUTS}
{{
{MASKED_SCORES}
{PROBABILITIES}
    attended_float = MatMul (quantized, v_rows)
{RESULT}
}}
"""


def body(opset: int = 20) -> onnx.FunctionProto:
    return parse_body(BODY, opset)
