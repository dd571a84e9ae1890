"""The operators that integers are multiplied by."""

from __future__ import annotations

from tqdit.lint.program import GraphNode
from tqdit.lint.values import Value

PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")


def operands(node: GraphNode) -> tuple[Value, ...]:
    """The two factors of a product, nothing for other nodes."""
    return node.inputs[:2] if node.op_type in PRODUCTS and node.standard else ()


def output_channel(node: GraphNode, operand: int, rank: int) -> int:
    """The axis of a product's factor along which its results stay apart, so that a scale can be taken out."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    last = operand == 1
    if node.op_type == "Gemm" and node.integer("transB" if operand == 1 else "transA", 0):
        last = not last
    return rank - 1 if last else rank - 2
