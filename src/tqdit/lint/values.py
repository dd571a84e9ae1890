"""What is known about one tensor before anything runs: type, shape and, if it is a small constant, its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference.ops import load_op

if TYPE_CHECKING:
    from tqdit.lint.program import GraphNode

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
SMALL = 65536  # elements; scales and zero points lie far below, weights mostly above
RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial",
          "Dropout"}  # fmt: skip
ARITHMETIC = {"Add", "Sub", "Mul", "Div"}
LAYOUT = {"Identity", "Cast", "CastLike", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}


@dataclass(frozen=True)
class Value:
    """`constant`: every backend can compute it at build time. `dtype` is UNDEFINED, which is false, if unknown.

    Of constants: `shape`, `array` if it is small and available, and `origin`, the initializer that it is a copy of up
    to its type and layout. `quantized` if it comes from a DequantizeLinear through nothing but layout.
    """

    constant: bool = False
    dtype: ir.DataType = ir.DataType.UNDEFINED
    shape: tuple[int, ...] | None = None
    array: NDArray[Any] | None = None
    origin: str = ""
    quantized: Quantized | None = None

    @property
    def size(self) -> int | None:
        """Number of elements, if the shape is known."""
        return None if self.shape is None else int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Quantized:
    """The DequantizeLinear behind a value. `axis` is that of a per-channel scale in the layout of the value that
    carries this, None if the scale is one number or blocked, or if the new layout is unknown."""

    node: str
    data: Value
    scale: Value
    axis: int | None


UNKNOWN = Value()


class Values:
    """The values of one model, found node by node in the order of the graph."""

    def __init__(self, overridable: bool, read_external: bool) -> None:
        """overridable: an initializer that is also an input is only a default, as it is since IR version 4."""
        self._overridable, self._read_external = overridable, read_external
        self._known: dict[ir.Value, Value] = {}

    def of(self, value: ir.Value | None) -> Value:
        if value is None:
            return UNKNOWN
        if value not in self._known:
            self._known[value] = self._stored(value)
        return self._known[value]

    def add(self, node: GraphNode) -> None:
        """What is known about the outputs of a node, from that about its inputs."""
        for value in node.ir_node.outputs:
            self._known[value] = self._output(node, value)

    def _stored(self, value: ir.Value) -> Value:
        """An input, an initializer, or the output of a Constant node."""
        bare = inferred(value)
        try:
            tensor = ir.convenience.get_const_tensor(value)
        except ValueError:  # a Constant node without a value
            return bare
        if tensor is None:
            return bare
        constant = not (self._overridable and value.is_graph_input())
        origin = (value.name or "") if value.is_initializer() else ""
        return Value(constant, tensor.dtype, tuple(tensor.shape.numpy()), self._numbers(tensor), origin)

    def _numbers(self, tensor: ir.TensorProtocol) -> NDArray[Any] | None:
        if tensor.size > SMALL or (isinstance(tensor, ir.ExternalTensor) and not self._read_external):
            return None
        try:
            array = tensor.numpy()
            return None if array.dtype.kind in "OSUc" else array  # text and complex numbers are no scales
        except Exception:  # damaged, or its file is missing: the lint does not judge its numbers
            return None

    def _output(self, node: GraphNode, value: ir.Value) -> Value:
        bare = inferred(value)
        if not node.standard:
            return bare
        if node.op_type == "Constant":
            return self._stored(value)
        opens = any(attribute.type.name in ("GRAPH", "GRAPHS") for attribute in node.ir_node.attributes.values())
        given = [known for index, known in enumerate(node.inputs) if node.given(index)]
        constant = all(known.constant for known in given) and node.op_type not in RANDOM and not opens
        bare = replace(bare, constant=constant)
        first = node.value(0)
        if node.op_type == "QuantizeLinear":
            return replace(bare, origin=first.origin)
        if node.op_type == "DequantizeLinear":
            return _dequantized(node, bare)
        if constant and node.op_type in ARITHMETIC | LAYOUT:
            bare = replace(bare, array=_evaluated(node))
            bare = bare if bare.array is None else replace(bare, shape=bare.array.shape)
        if node.op_type in LAYOUT:
            bare = replace(bare, origin=first.origin, quantized=_moved(node, first))
        return bare


def inferred(value: ir.Value) -> Value:
    """Type and shape alone; a shape with a dimension that is not a number counts as unknown."""
    shape = None if value.shape is None or not value.shape.is_static() else tuple(value.shape.numpy())
    return Value(dtype=value.dtype or ir.DataType.UNDEFINED, shape=shape)


def _dequantized(node: GraphNode, bare: Value) -> Value:
    data, scale = node.value(0), node.value(1)
    axis = node.integer("axis", 1)
    if axis < 0 and data.shape is not None:
        axis += len(data.shape)
    quantized = Quantized(node.label, data, scale, axis if per_channel(scale) else None)
    return replace(bare, origin=data.origin, quantized=quantized)


def _moved(node: GraphNode, source: Value) -> Quantized | None:
    """The DequantizeLinear behind a change of layout, with the axis of its scales in the new layout."""
    quantized = source.quantized
    if quantized is None or quantized.axis is None or node.op_type in ("Identity", "Cast", "CastLike"):
        return quantized
    axis = None
    if node.op_type == "Transpose" and source.shape is not None:
        order = node.ir_node.attributes.get_ints("perm", list(reversed(range(len(source.shape)))))
        axis = list(order).index(quantized.axis) if quantized.axis in order else None
    return replace(quantized, axis=axis)


def _evaluated(node: GraphNode) -> NDArray[Any] | None:
    """The numbers of a node of small constants by ONNX's reference implementation; None if they cannot be computed."""
    arrays = [value.array for index, value in enumerate(node.inputs) if node.given(index)]
    known = [array for array in arrays if array is not None]
    attributes = {name: attribute.value for name, attribute in node.ir_node.attributes.items()}
    try:
        shapes = [array.shape for array in known] if node.op_type in ARITHMETIC else [known[0].shape]
        if len(known) < len(arrays) or math.prod(np.broadcast_shapes(*shapes)) > SMALL:
            return None
        with np.errstate(all="ignore"):
            found = load_op("", node.op_type, node.opset).eval(*known, **attributes)
        return np.asarray(found)
    except Exception:  # operands or attributes that do not go together: a backend refuses them, nothing to judge
        return None


def per_channel(scale: Value) -> bool:
    """One scale per index of one axis; a single element in one dimension is one scale for the whole tensor."""
    return scale.shape is not None and len(scale.shape) == 1 and scale.shape[0] > 1


def blocked(scale: Value) -> bool:
    """A scale of the tensor's own rank: per block, or per token."""
    return scale.shape is not None and len(scale.shape) > 1 and (scale.size or 0) > 1
