"""A quantized operand in the graph: what a scheme's form asks for, as nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from tqdit.exporter.passes.emit import Emitter, codes, int8_codes, quantize_dequantize, simulate
from tqdit.exporter.passes.groups import GroupSelector
from tqdit.quantization.quantizer import Float32, Part, Quantizer, RegionOps, Rounding, factor_scales

ROUNDINGS = {"integer": quantize_dequantize, "simulated": simulate, "codes": codes, "int8": int8_codes}
CODES = ("codes", "int8")  # what these make is not scaled yet


class GraphOperand:
    """The `GraphArithmetic` of one quantizer.

    `name` begins the names of its initializers, `rank` is the number of dimensions of the tensor.
    """

    def __init__(
        self, emit: Emitter, quantizer: Quantizer, name: str, rank: int, groups: GroupSelector, rounding: Rounding
    ) -> None:
        self.emit, self.quantizer, self.name, self.rank = emit, quantizer, name, rank
        self.groups, self.rounding = groups, rounding
        self.constants = quantizer.constants()

    def parts(self, x: ir.Value) -> Iterator[Part[ir.Value]]:
        """The terms of x^; the nodes of each are added when it is asked for."""
        return self.quantizer.graph_parts(self, x)

    def op(self, op_type: str, *inputs: ir.Value) -> ir.Value:
        return self.emit.op(op_type, *inputs)

    def constant(self, name: str, x: ir.Value) -> ir.Value:  # noqa: ARG002 (the rank is known)
        array = self.constants[name]
        if array.ndim:
            return self.groups.select(self.emit, f"{self.name}.{name}", array, self.rank)
        return self.emit.constant(f"{self.name}.{name}", np.float32(array))

    def add(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.op("Add", x, y)

    def multiply(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.op("Mul", x, y)

    def subtract(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.op("Sub", x, y)

    def divide(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.op("Div", x, y)

    def maximum(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.op("Max", x, y)

    def minimum(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.op("Min", x, y)

    def absolute(self, x: ir.Value) -> ir.Value:
        return self.op("Abs", x)

    def largest(self, x: ir.Value) -> ir.Value:
        return self.op("ReduceMax", x, self._last_axis())

    def smallest(self, x: ir.Value) -> ir.Value:
        return self.op("ReduceMin", x, self._last_axis())

    def _last_axis(self) -> ir.Value:
        return self.emit.constant(f"{self.name}.axes", np.array([-1]))

    def negative(self, x: ir.Value) -> ir.Value:
        return self.op("Min", x, self._zero())

    def positive(self, x: ir.Value) -> ir.Value:
        return self.op("Max", x, self._zero())

    def _zero(self) -> ir.Value:
        return self.emit.constant(f"{self.name}.zero", np.float32(0))

    def rounded(self, x: ir.Value, scale: str) -> Part[ir.Value]:
        """Initializers are named after the operand, and after the region if the scheme has several scales."""
        array, region = self.constants[scale], scale.removesuffix("scale").removesuffix("_")
        name = f"{self.name}.{region}" if region else self.name
        reference, ratios = factor_scales(array)
        ratio = self.groups.select(self.emit, f"{name}.ratio", ratios, self.rank) if array.ndim else None
        divided = x if ratio is None else self.op("Div", x, ratio)
        values = ROUNDINGS[self.rounding](self.emit, divided, name, np.float32(reference), self.quantizer.code_bits)
        return Part(values, ratio, unit=float(reference) if self.rounding in CODES else 1.0)

    def softmax_in_regions(self, probabilities: ir.Value, ops: RegionOps) -> Sequence[ir.Value]:
        softmax = probabilities.producer()
        assert softmax is not None
        assert softmax.op_type == "Softmax"
        scores = softmax.inputs[0]
        assert scores is not None
        emit = Emitter(self.emit.graph, softmax, f"{self.emit.scope.rpartition('.')[0]}.softmax")
        low_scale = by_image(emit, "low_scale", self.constants[ops.low], self.groups)
        bits, high_scale = self.quantizer.bits, float(self.constants[ops.high])
        outputs = emit.custom(ops.softmax, scores, low_scale, bits=bits, high_scale=high_scale, outputs=ops.outputs)
        replace(emit.graph, softmax, outputs[0])
        return outputs


def by_image(emit: Emitter, name: str, values: Float32, groups: GroupSelector) -> ir.Value:
    """Numbers () or (G,) as an input (1,) or (B,) of a custom op, such as `low_scale`."""
    if values.ndim:
        return groups.select(emit, name, values, rank=1)
    return emit.constant(name, values.reshape(1))


def multiply(
    emit: Emitter, parts: Iterable[Part[ir.Value]], product: Callable[[ir.Value], ir.Value],
    shift: Callable[[ir.Value], ir.Value] | None = None,
) -> ir.Value:  # fmt: skip
    """x^ times another operand, like `fake_quant.multiply`: `shift` gives an offset times that operand's row sums."""
    total = None
    for part in parts:
        added = None if part.offset is None or shift is None else shift(part.offset)
        term = product(part.values)
        if part.ratio is not None:
            term = emit.op("Mul", term, part.ratio)
        if added is not None:
            term = emit.op("Add", term, added)
        total = term if total is None else emit.op("Add", total, term)
    assert total is not None
    return total


def replace(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Use `value` in place of what `node` gives; it takes over its type, its shape and an output's name."""
    old = node.outputs[0]
    value.type, value.shape = old.type, old.shape
    if old.is_graph_output():
        old.name, value.name = f"{old.name}_float", old.name
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def rank_of(value: ir.Value) -> int:
    assert value.shape is not None, "the trace has shapes, and `replace` keeps them"
    return len(value.shape)
