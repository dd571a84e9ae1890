"""MultiRegionNumeratorAttention: inputs, attributes and output of MultiRegionAttention."""

from __future__ import annotations

import onnx

from tqdit.plugins.function import parse_body
from tqdit.plugins.multi_region_attention.schema import INPUTS, MASKED_SCORES
from tqdit.plugins.multi_region_numerator.schema import NUMERATORS

OP_TYPE = "MultiRegionNumeratorAttention"

BODY = f"""
<domain: "tqdit", opset_import: ["" : 20]>
MultiRegionNumeratorAttention {INPUTS}
{{
{MASKED_SCORES}
{NUMERATORS}
    product_with_v = MatMul (quantized, v_float)
    attended_float = Mul (product_with_v, reciprocals)
    attended = CastLike (attended_float, q)
}}
"""


def body(opset: int = 20) -> onnx.FunctionProto:
    return parse_body(BODY, opset)
