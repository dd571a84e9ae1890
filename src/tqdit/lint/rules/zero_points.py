"""Integer types and zero points: int8 around 0 is what every backend keeps.

1. The integers are uint8, said or by the specification's default (a QuantizeLinear without zero point).
2. The zero point is not 0.
3. The zero point is known only at run time.
4. A QuantizeLinear writes int8 by `output_dtype`, with no zero point beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from tqdit.lint.finding import TENSORRT, Finding, Rule
from tqdit.lint.program import GraphNode, Program, quantized_type

RULE = Rule("zero-point")


def check(program: Program) -> Iterator[Finding]:
    for node in program.standard_nodes("QuantizeLinear", "DequantizeLinear"):
        yield from _integer_type(node)
        yield from _zero_point(node)


def _integer_type(node: GraphNode) -> Iterator[Finding]:
    quantizes = node.op_type == "QuantizeLinear"
    dtype = quantized_type(node) if quantizes else node.value(2 if node.given(2) else 0).dtype
    if dtype == ir.DataType.UINT8:
        why = "" if node.given(2) or not quantizes else ", since it has no zero point and uint8 is the default"
        stored = not quantizes and node.value(0).constant
        consequence = (
            "TensorRT refuses uint8 initializers."
            if stored
            else "TensorRT takes them for int8 silently: codes above 127 saturate."
        )
        yield RULE.error(
            node.label,
            f"its integers are uint8{why}. {consequence}",
            "Use int8 with a zero point of 0 (an int8 zero point has to be written out on QuantizeLinear).",
            TENSORRT,
        )
    elif quantizes and dtype == ir.DataType.INT8 and not node.given(2):
        yield RULE.error(
            node.label,
            "it writes int8 by output_dtype, without a zero point. ONNX Runtime does not fuse such a node: the product "
            "runs in float.",
            "Give it and its DequantizeLinear a constant int8 zero point of 0.",
            ("onnxruntime",),
        )


def _zero_point(node: GraphNode) -> Iterator[Finding]:
    if not node.given(2):
        return
    value, name = node.value(2), node.input_names[2]
    if not value.constant:
        yield RULE.error(
            node.label,
            f"its zero point '{name}' is computed at run time. TensorRT refuses the file, other backends lose INT8.",
            "Use a constant zero point of 0; take an offset out before: (x - b) / r -> QuantizeLinear.",
        )
    elif value.array is not None and np.any(value.array.astype(np.float32) != 0):
        yield RULE.error(
            node.label,
            f"its zero point '{name}' is not 0. TensorRT is symmetric only and refuses the file.",
            "Use a zero point of 0 and fold the offset b exactly: (x - b) -> QuantizeLinear/DequantizeLinear -> MatMul "
            "-> + b * colsum(W).",
            TENSORRT,
        )
