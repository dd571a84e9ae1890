"""Operators and integer types around quantization that TensorRT's parser refuses.

1. Operators that quantize at run time or hold the integer product themselves: DynamicQuantizeLinear, MatMulInteger,
   ConvInteger, QLinearMatMul, QLinearConv and the like.
2. An int32 tensor, such as a bias, through DequantizeLinear.
3. uint4.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from tqdit.lint.finding import TENSORRT, Finding, Rule
from tqdit.lint.program import GraphNode, Program, quantized_type

RULE = Rule("operator")
INTEGER_OPERATORS = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")
REMEDY: dict[ir.DataType, str] = {
    ir.DataType.INT32: "Add the bias in float after the product; backends fuse it into the product's end.",
    ir.DataType.UINT4: "Use int4 in blocks for weights, or codes of 4 bits stored as int8.",
}


def check(program: Program) -> Iterator[Finding]:
    for node in program.nodes:
        if node.op_type in INTEGER_OPERATORS or node.op_type.startswith("QLinear"):
            yield RULE.error(
                node.label,
                f"TensorRT does not know {node.op_type} and refuses the file.",
                "Write QuantizeLinear -> DequantizeLinear -> the float operator with constant scales; backends make "
                "the integer product of it.",
                TENSORRT,
            )
        elif node.standard and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from _type(node)


def _type(node: GraphNode) -> Iterator[Finding]:
    quantizes = node.op_type == "QuantizeLinear"
    dtype = quantized_type(node) if quantizes else node.value(0).dtype
    if dtype in REMEDY and not (quantizes and dtype == ir.DataType.INT32):
        what = "writes" if quantizes else "dequantizes"
        yield RULE.error(
            node.label,
            f"it {what} {dtype.name.lower()}. TensorRT's parser refuses the file.",
            REMEDY[dtype],
            TENSORRT,
        )
