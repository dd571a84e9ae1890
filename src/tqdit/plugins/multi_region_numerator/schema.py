"""MultiRegionNumerator(scores float[B,H,N,M], low_scale float[B]; bits, high_scale)
-> (numerators float[B,H,N,M], reciprocals float[B,H,N,1]).
"""

from __future__ import annotations

import onnx

from tqdit.plugins.function import parse_body
from tqdit.plugins.multi_region_softmax.schema import IN_TWO_REGIONS

OP_TYPE = "MultiRegionNumerator"

# The largest probability is 1 / sum. Engines have a kernel for Softmax, and two passes after it are fewer than the four
# of maximum, difference, exponential and sum.
NUMERATORS = f"""
    probabilities = Softmax <axis: int = -1> (scores)
    last = Constant <value_ints: ints = [-1]> ()
    reciprocals = ReduceMax <keepdims: int = 1> (probabilities, last)
    p = Div (probabilities, reciprocals)
{IN_TWO_REGIONS}
"""
BODY = f"""
<domain: "tqdit", opset_import: ["" : 20]>
MultiRegionNumerator <bits, high_scale> (scores, low_scale) => (quantized, reciprocals)
{{
{NUMERATORS}
}}
"""


def body(opset: int = 20) -> onnx.FunctionProto:
    return parse_body(BODY, opset)
