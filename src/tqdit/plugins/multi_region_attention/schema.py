"""MultiRegionAttention(q T[B,H,N,d], k, v T[B,H,M,d], mask float[B,H,N,M], low_scale float[B]; bits, high_scale, scale)
-> T[B,H,N,d].

T is float, float16 or bfloat16; the body computes in float32.
"""

from __future__ import annotations

import onnx

from tqdit.plugins.function import parse_body
from tqdit.plugins.multi_region_softmax.schema import PROBABILITIES

OP_TYPE = "MultiRegionAttention"

INPUTS = "<bits, high_scale, scale> (q, k, v, mask, low_scale) => (attended)"
MASKED_SCORES = """
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
"""
BODY = f"""
<domain: "tqdit", opset_import: ["" : 20]>
MultiRegionAttention {INPUTS}
{{
{MASKED_SCORES}
{PROBABILITIES}
    attended_float = MatMul (quantized, v_float)
    attended = CastLike (attended_float, q)
}}
"""


def body(opset: int = 20) -> onnx.FunctionProto:
    return parse_body(BODY, opset)
