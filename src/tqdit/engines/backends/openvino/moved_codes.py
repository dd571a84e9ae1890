"""Codes are moved in place of floats: quantizers before the operations that only rearrange values.

    linear -> Reshape, Transpose, Gather -> Q, DQ   ->   linear -> Q, DQ -> Reshape, Transpose, Gather

OpenVINO moves the DequantizeLinear behind the rearrangement by itself, rounds in the loop that computes the linear
layer, and moves codes, which take a quarter of the memory of floats. One layer may make q, k and v, which have scales
of their own: column c of it, whose quantizer has the scale s_c, is then multiplied by s / s_c, in constants of the
layer, one quantizer has the scale s, and the products are multiplied by s_c / s. Codes are the same, except for ties
that float rounding decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

MOVES = {"Reshape", "Transpose", "Gather", "Slice", "Split", "Squeeze", "Unsqueeze"}  # their first input
INT8 = onnx.TensorProto.INT8
_Edit = tuple[onnx.NodeProto, int, NDArray[np.float32]]  # a node, which of its inputs, and the new constant


@dataclass(frozen=True, eq=False)
class _Quantizer:
    """x -> Q((x - offset) / scale) -> DQ, which products alone read."""

    x: str
    nodes: list[onnx.NodeProto]  # Sub of the offset, if there is one, QuantizeLinear, DequantizeLinear
    scale: float

    @property
    def has_offset(self) -> bool:
        return len(self.nodes) > 2


@dataclass(frozen=True, eq=False)
class _Source:
    """A value whose every element is moved, and then rounded."""

    name: str
    moves: list[onnx.NodeProto]
    quantizers: list[_Quantizer]  # in the order of the graph


def moves_floats(model: onnx.ModelProto) -> bool:
    """Whether `move_codes` could find anything."""
    moved = {name for node in model.graph.node if node.op_type in MOVES for name in node.output}
    moved |= {node.output[0] for node in model.graph.node if node.op_type == "Sub" and node.input[0] in moved}
    return any(node.op_type == "QuantizeLinear" and node.input[0] in moved for node in model.graph.node)


def move_codes(model: onnx.ModelProto, folder: Path) -> int:
    """Rewrite in place; returns the number of values that are rounded before they are moved.

    folder: where external data lies. Quantizers with a zero point, or with a scale that is no constant, stay where they
    are, and so do those of values that are not rounded whole.
    """
    return _Mover(model, folder).run()


class _Mover:
    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self.graph = graph = model.graph
        self.opsets, self.folder = model.opset_import, folder
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.order = {id(node): index for index, node in enumerate(graph.node)}
        self.shapes = {
            info.name: [size.dim_value for size in info.type.tensor_type.shape.dim] for info in graph.value_info
        }
        self.outputs = {value.name for value in graph.output}
        self.after: dict[int, list[onnx.NodeProto]] = {}  # new nodes behind old ones
        self.dropped: set[int] = set()

    def run(self) -> int:
        done = sum(self._move(source) for source in self._sources())
        nodes = [new for node in self.graph.node for new in self._kept(node)]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        return done

    def _kept(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        if id(node) not in self.dropped:
            yield node
        yield from self.after.get(id(node), ())

    def _sources(self) -> list[_Source]:
        starts = dict[str, None]()
        for quantizer in filter(None, map(self._quantizer, self.graph.node)):
            name = quantizer.x
            while name in self.makers and self.makers[name].op_type in MOVES:
                name = self.makers[name].input[0]
            if name in self.makers and name != quantizer.x:
                starts[name] = None
        return [found for found in map(self._source, starts) if found is not None]

    def _quantizer(self, first: onnx.NodeProto) -> _Quantizer | None:
        """The one that a node begins, if it rounds to int8 with one constant scale."""
        nodes = [first]
        if first.op_type == "Sub":
            offset, readers = self.constants.get(first.input[1]), self.readers.get(first.output[0], [])
            if offset is None or offset.dims or len(readers) != 1:
                return None
            nodes += readers
        quantize = nodes[-1]
        if quantize.op_type != "QuantizeLinear" or len(quantize.input) < 3:
            return None
        scale, zero = (self.constants.get(name) for name in quantize.input[1:3])
        if scale is None or zero is None or zero.data_type != INT8 or scale.dims or self._value(zero).any():
            return None
        nodes += self.readers.get(quantize.output[0], [])
        last, products = nodes[-1], self.readers.get(nodes[-1].output[0], [])
        if len(nodes) != 2 + (first is not quantize) or last.op_type != "DequantizeLinear":
            return None
        results = {name for node in nodes for name in node.output}
        if list(last.input[1:3]) != list(quantize.input[1:3]) or results & self.outputs:
            return None
        if any(product.op_type != "MatMul" for product in products):
            return None
        return _Quantizer(first.input[0], nodes, float(self._value(scale)))

    def _source(self, name: str) -> _Source | None:
        """None if some of its elements go anywhere but to such a quantizer."""
        moves, quantizers, values = list[onnx.NodeProto](), list[_Quantizer](), [name]
        for value in values:
            if value in self.outputs:
                return None
            for reader in self.readers.get(value, ()):
                if reader.op_type in MOVES and reader.input[0] == value:
                    if not any(reader is one for one in moves):
                        moves.append(reader)
                        values += reader.output
                    continue
                quantizer = self._quantizer(reader)
                if quantizer is None:
                    return None
                quantizers.append(quantizer)
        if len(quantizers) > 1 and any(one.has_offset for one in quantizers):
            return None
        return _Source(name, moves, sorted(quantizers, key=lambda one: self.order[id(one.nodes[0])]))

    def _move(self, source: _Source) -> bool:
        # Of q, k and v the last: a number multiplies the product of q and k anyway.
        last, scales = source.quantizers[-1], {one.scale for one in source.quantizers}
        if len(scales) > 1 and not self._equalise(source, last.scale):
            return False
        readers, made = self.readers[source.name], list[onnx.NodeProto]()
        rounded = source.name
        for node in last.nodes:
            before, rounded = rounded, f"{source.name}.{node.op_type}"
            made.append(onnx.NodeProto.FromString(node.SerializeToString()))
            made[-1].input[0], made[-1].output[0], made[-1].name = before, rounded, f"{node.name}.early"
        for node in readers:
            node.input[0] = rounded
        self.after.setdefault(id(self.makers[source.name]), []).extend(made)
        for quantizer in source.quantizers:
            value = rounded if quantizer.x == source.name else quantizer.x
            self._leave_out(quantizer, value, quantizer.scale / last.scale)
        return True

    def _leave_out(self, quantizer: _Quantizer, value: str, factor: float) -> None:
        """Let products read a value that is rounded. factor: the quantizer's scale over that of the early one."""
        self.dropped |= {id(node) for node in quantizer.nodes}
        (result,) = quantizer.nodes[-1].output
        for product in self.readers[result]:
            for place, name in enumerate(product.input):
                if name == result:
                    product.input[place] = value
            if factor != 1:
                self._multiply(product, factor)

    def _multiply(self, product: onnx.NodeProto, factor: float) -> None:
        """Multiply a product's result; by another number where a number multiplies it anyway."""
        (result,) = product.output
        readers = self.readers.get(result, [])
        if len(readers) == 1 and readers[0].op_type == "Mul" and result not in self.outputs:
            (place,) = (index for index, name in enumerate(readers[0].input) if name != result)
            tensor = self.constants.get(readers[0].input[place])
            if tensor is not None and not tensor.dims:
                readers[0].input[place] = self._add_constant(
                    f"{tensor.name}.by.{product.name}", np.float32(float(self._value(tensor)) * factor)
                )
                return
        product.output[0] = raw = f"{result}.raw"
        number = self._add_constant(f"{raw}.factor", np.float32(factor))
        self.after.setdefault(id(product), []).insert(0, _like(product, "Mul", [raw, number], result, "factor"))

    def _equalise(self, source: _Source, scale: float) -> bool:
        """Multiply the columns of a value so that one scale is right for all; False if that cannot be done."""
        factors = self._factors(source, scale)
        if factors is None:
            return False
        edits = self._edits(self.makers[source.name], factors)
        if edits is None:
            return False
        for number, (node, place, array) in enumerate(edits):
            node.input[place] = self._add_constant(f"{source.name}.columns.{number}", array)
        return True

    def _factors(self, source: _Source, scale: float) -> NDArray[np.float64] | None:
        """(C,): `scale` over that of each column's quantizer; None if a column has several, or none."""
        shape = self.shapes.get(source.name, [0])
        used = {name for node in source.moves for name in node.input[1:] if name}
        if not all(shape[1:]) or not used <= self.constants.keys():
            return None
        shape = [shape[0] or 1, *shape[1:]]
        part = onnx.helper.make_graph(
            source.moves, "moves", [onnx.helper.make_tensor_value_info(source.name, onnx.TensorProto.FLOAT, shape)],
            [onnx.helper.make_empty_tensor_value_info(one.x) for one in source.quantizers],
            [self.constants[name] for name in used],
        )  # fmt: skip
        columns = np.broadcast_to(np.arange(shape[-1], dtype=np.float32), shape)
        model = onnx.helper.make_model(part, opset_imports=self.opsets)
        factors = np.zeros(shape[-1])
        parts = ReferenceEvaluator(model).run(None, {source.name: columns})
        for found, quantizer in zip(parts, source.quantizers, strict=True):
            where = np.unique(found).astype(np.int64)
            if factors[where].any():
                return None
            factors[where] = scale / quantizer.scale
        return factors if factors.all() else None

    def _edits(self, node: onnx.NodeProto, factors: NDArray[np.float64]) -> list[_Edit] | None:
        """New constants that make a node's result `factors` (C,) times as large; None if it is no linear layer's."""
        match node.op_type:
            case "Add" | "Sub":
                both = [self._edits_of(node, place, factors) for place in (0, 1)]
                return None if both[0] is None or both[1] is None else both[0] + both[1]
            case "Mul":
                return self._edits_of(node, 0, factors) or self._edits_of(node, 1, factors)
            case "MatMul":
                return self._edits_of(node, 1, factors)
            case "DequantizeLinear":
                weight = self.constants.get(node.input[0])  # (K, C), its scale along axis 1
                if weight is not None and list(weight.dims[1:]) == [len(factors)]:
                    return self._edits_of(node, 1, factors)
        return None

    def _edits_of(self, node: onnx.NodeProto, place: int, factors: NDArray[np.float64]) -> list[_Edit] | None:
        name = node.input[place]
        if name in self.constants:
            array = self._value(self.constants[name])
            if array.dtype != np.float32 or array.size not in (1, len(factors)):
                return None
            return [(node, place, (array.astype(np.float64).ravel() * factors).astype(np.float32))]
        maker = self.makers.get(name)
        return None if maker is None or len(self.readers[name]) != 1 else self._edits(maker, factors)

    def _value(self, tensor: onnx.TensorProto) -> NDArray[Any]:
        return numpy_helper.to_array(tensor, str(self.folder))

    def _add_constant(self, name: str, array: NDArray[np.float32] | np.float32) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(array), name)
        self.graph.initializer.append(self.constants[name])
        return name


def _like(node: onnx.NodeProto, op_type: str, inputs: list[str], output: str, name: str) -> onnx.NodeProto:
    """A node of the same module."""
    made = onnx.helper.make_node(op_type, inputs, [output], name=f"{node.name}.{name}")
    made.metadata_props.extend(node.metadata_props)
    return made
