"""TimeGroupSelect(timestep int64[B], boundaries int64[G-1], table float[G, ...]) -> float[B, ...].

Timestep and boundaries of a network with a float timestep are float32.
"""

from __future__ import annotations

import onnx

from tqdit.plugins.function import parse_body

OP_TYPE = "TimeGroupSelect"

BODY = """
<domain: "tqdit", opset_import: ["" : 20]>
TimeGroupSelect (timestep, boundaries, table) => (selected)
{
    axis = Constant <value_ints: ints = [1]> ()
    column = Unsqueeze (timestep, axis)
    passed = GreaterOrEqual (column, boundaries)
    counted = Cast <to: int = 7> (passed)
    group = ReduceSum <keepdims: int = 0> (counted, axis)
    selected = Gather <axis: int = 0> (table, group)
}
"""


def body(opset: int = 20) -> onnx.FunctionProto:
    return parse_body(BODY, opset)
