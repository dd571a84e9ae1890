"""Element types that do not go together.

1. The scale of a QuantizeLinear has another type than what it quantizes.
2. The two dequantized operands of one product have different types.
"""

from __future__ import annotations

from collections.abc import Iterator

from tqdit.lint.finding import Finding, Rule
from tqdit.lint.program import GraphNode, Program
from tqdit.lint.rules.products import operands

RULE = Rule("scale-type")


def check(program: Program) -> Iterator[Finding]:
    for node in program.nodes:
        if not node.standard:
            continue
        if node.op_type == "QuantizeLinear":
            yield from _input(node)
        else:
            yield from _product(node)


def _input(node: GraphNode) -> Iterator[Finding]:
    x, scale = node.value(0).dtype, node.value(1).dtype
    if x and scale and x != scale:
        yield RULE.error(
            node.label,
            f"it quantizes {x.name.lower()} with a {scale.name.lower()} scale. ONNX Runtime refuses the file.",
            "Cast the input to the type of the scale; float32 around the integers is the safe choice.",
        )


def _product(node: GraphNode) -> Iterator[Finding]:
    pair = [(value.quantized, value.dtype) for value in operands(node) if value.quantized is not None]
    if len(pair) != 2:
        return
    (a, a_type), (b, b_type) = ((quantized, quantized.scale.dtype or dtype) for quantized, dtype in pair)
    if a_type and b_type and a_type != b_type:
        yield RULE.error(
            node.label,
            f"its operands are dequantized with a {a_type.name.lower()} scale ({a.node}) and a {b_type.name.lower()} "
            f"scale ({b.node}). Backends refuse it, or, with a cast between, TensorRT and ONNX Runtime run it "
            "in float.",
            "Give both scales one type; float32 around the integers is the safe choice.",
        )
