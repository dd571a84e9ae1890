"""MultiRegionNumeratorIntegerAttention: inputs, attributes and output of MultiRegionIntegerAttention."""

from __future__ import annotations

import onnx

from tqdit.plugins.function import parse_body
from tqdit.plugins.multi_region_integer_attention.schema import INPUTS, MASKED_SCORES, RESULT
from tqdit.plugins.multi_region_numerator.schema import NUMERATORS

OP_TYPE = "MultiRegionNumeratorIntegerAttention"

BODY = f"""
<domain: "tqdit", opset_import: ["" : 20]>
MultiRegionNumeratorIntegerAttention {INPUTS}
{{
{MASKED_SCORES}
{NUMERATORS}
    product_with_v = MatMul (quantized, v_rows)
    attended_float = Mul (product_with_v, reciprocals)
{RESULT}
}}
"""


def body(opset: int = 20) -> onnx.FunctionProto:
    return parse_body(BODY, opset)
