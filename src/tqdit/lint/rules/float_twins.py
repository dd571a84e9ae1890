"""Weights that are still there in float although the product is quantized.

1. A float weight feeds a product, and the same initializer, quantized, feeds another.
2. A float weight feeds a product of the module, or has the name, of a quantized weight of the same shape.
3. A float weight of the name and shape of a quantized one that nothing uses.
4. A weight is stored in float and quantized while the graph loads: QuantizeLinear on an initializer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tqdit.lint.finding import Finding, Rule
from tqdit.lint.program import GraphNode, Program
from tqdit.lint.rules.products import operands
from tqdit.lint.values import FLOATS, Value, inferred

RULE = Rule("float-twin")
_SUFFIX = re.compile(r"[._/-](q|quantized|int8|i8|codes|dq|dequantized|float|float32|fp32|f32|orig(inal)?)$")
Size = tuple[int, ...]


@dataclass(frozen=True)
class _Weight:
    """A constant factor of a product."""

    node: GraphNode
    value: Value

    @property
    def size(self) -> Size:
        """The shape in any layout."""
        return tuple(sorted(self.value.shape or ()))


def check(program: Program) -> Iterator[Finding]:
    weights = [
        _Weight(node, value)
        for node in program.nodes
        for value in operands(node)
        if value.constant and value.shape is not None and len(value.shape) > 1
    ]
    quantized = [weight for weight in weights if weight.value.quantized is not None]
    yield from _survivors([weight for weight in weights if _is_float(weight.value)], quantized)
    yield from _unused(program, quantized)
    yield from _stored_in_float(program)


def _is_float(value: Value) -> bool:
    return value.quantized is None and value.dtype in FLOATS


def _survivors(floats: list[_Weight], quantized: list[_Weight]) -> Iterator[Finding]:
    origins = {weight.value.origin: weight for weight in quantized if weight.value.origin}
    names = {(_stem(weight.value.origin), weight.size): weight for weight in quantized if weight.value.origin}
    scopes = {(weight.node.scope, weight.size): weight for weight in quantized if weight.node.scope}
    for weight in floats:
        origin = weight.value.origin
        twin = origins.get(origin) or names.get((_stem(origin), weight.size))
        twin = twin or scopes.get((weight.node.scope, weight.size))
        if twin is not None:
            yield RULE.error(
                weight.node.label,
                f"it multiplies by the float weight '{origin}', whose quantized twin '{twin.value.origin}' feeds "
                f"{twin.node.label}. This product runs in float, and the file holds the weight twice.",
                "Let every use of the weight read the dequantized one, and remove the float initializer.",
            )


def _unused(program: Program, quantized: list[_Weight]) -> Iterator[Finding]:
    names = {(_stem(weight.value.origin), weight.size): weight for weight in quantized if weight.value.origin}
    for value in program.file.graph.initializers.values():
        known, name = inferred(value), value.name or ""
        twin = names.get((_stem(name), tuple(sorted(known.shape or ()))))
        if twin is not None and not value.uses() and not value.is_graph_output() and known.dtype in FLOATS:
            yield RULE.warning(
                name,
                f"nothing uses this float weight; its quantized twin '{twin.value.origin}' feeds {twin.node.label}. "
                "It costs four times the space of the integers.",
                "Remove the initializer.",
            )


def _stored_in_float(program: Program) -> Iterator[Finding]:
    for node in program.standard_nodes("QuantizeLinear"):
        weight = node.value(0)
        if weight.constant and weight.dtype in FLOATS and weight.shape is not None and len(weight.shape) > 1:
            yield RULE.warning(
                node.label,
                f"it quantizes the constant '{weight.origin or node.input_names[0]}', which the file stores in float: "
                "four times the space of its integers.",
                "Store the int8 codes as the initializer and keep only the DequantizeLinear.",
            )


def _stem(name: str) -> str:
    """A weight's name without what exporters append for its type."""
    previous = ""
    while name != previous:
        previous, name = name, _SUFFIX.sub("", name)
    return re.sub(r"_(quantized|int8|q|codes|dequantized|fp32|float)$", "", name)
