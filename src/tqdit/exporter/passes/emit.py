"""Adding nodes to a graph: the vocabulary of the quantization passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import DTypeLike, NDArray

from tqdit.exporter.lazy import lazy
from tqdit.graph_names import SCOPE_KEY
from tqdit.plugins import DOMAIN
from tqdit.plugins.function import PLUGIN_ATTRIBUTES
from tqdit.quantization.rounding import code_range


class Emitter:
    """Inserts nodes in front of `before`, all in one scope of the module tree."""

    def __init__(self, graph: ir.Graph, before: ir.Node, scope: str) -> None:
        self.graph, self.before, self.scope = graph, before, scope

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Add a node with one output and return that."""
        return self._add(op_type, inputs, attributes)[0]

    def custom(self, op_type: str, *inputs: ir.Value, outputs: int = 1, **attributes: Any) -> Sequence[ir.Value]:
        """Add a node of our own domain, with the attributes by which TensorRT finds a plugin; returns its outputs."""
        return self._add(op_type, inputs, {**attributes, **PLUGIN_ATTRIBUTES}, DOMAIN, outputs)

    def _add(
        self, op_type: str, inputs: Sequence[ir.Value], attributes: dict[str, Any], domain: str = "", outputs: int = 1
    ) -> Sequence[ir.Value]:
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs,
                       metadata_props={SCOPE_KEY: self.scope})  # fmt: skip
        self.graph.insert_before(self.before, node)
        return node.outputs

    def constant(self, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
        """An initializer `SCOPE.name`; asking twice for the same name gives the same value."""
        return self._initializer(name, array.shape, lambda full: ir.tensor(np.asarray(array), name=full))

    def lazy(self, name: str, shape: Sequence[int], dtype: DTypeLike, make: Callable[[], NDArray[Any]]) -> ir.Value:
        """The same of an array that `make` returns when the graph is written, or each time that its values are read."""
        return self._initializer(name, shape, lambda full: lazy(full, shape, dtype, make))

    def _initializer(self, name: str, shape: Sequence[int], tensor_of: Callable[[str], ir.TensorProtocol]) -> ir.Value:
        full = f"{self.scope}.{name}" if self.scope else name
        known = self.graph.initializers.get(full)
        if known is not None:
            return known
        tensor = tensor_of(full)
        value = ir.Value(name=full, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def dequantize(emit: Emitter, name: str, stored: ir.Value, scale: NDArray[np.float32], axis: int) -> ir.Value:
    """The node that multiplies integer weights with their scales, which are a constant."""
    scales = emit.constant(f"{name}.scale", scale)
    if scale.ndim == 0:
        return emit.op("DequantizeLinear", stored, scales)
    return emit.op("DequantizeLinear", stored, scales, axis=axis)


def quantize_dequantize(emit: Emitter, x: ir.Value, name: str, scale: np.float32, bits: int) -> ir.Value:
    """s clip(round(x / s), -q, q - 1) as Q/DQ with a constant scale: what engines turn into integers."""
    stored = int8_codes(emit, x, name, scale, bits)
    zero = emit.constant(f"{name}.zero_point", np.int8(0))
    return emit.op("DequantizeLinear", stored, emit.constant(f"{name}.scale", np.float32(scale)), zero)


def int8_codes(emit: Emitter, x: ir.Value, name: str, scale: np.float32, bits: int) -> ir.Value:
    """clip(round(x / s), -q, q - 1) as int8.

    Below 8 bits the values are clipped before, which gives the same codes: both ends of the range are codes themselves.
    """
    scales = emit.constant(f"{name}.scale", np.float32(scale))
    zero = emit.constant(f"{name}.zero_point", np.int8(0))
    if bits < 8:
        low, high = code_range(bits)
        x = emit.op("Clip", x, emit.constant(f"{name}.low", np.float32(low) * np.float32(scale)),
                    emit.constant(f"{name}.high", np.float32(high) * np.float32(scale)))  # fmt: skip
    return emit.op("QuantizeLinear", x, scales, zero)


def simulate(emit: Emitter, x: ir.Value, name: str, scale: np.float32, bits: int) -> ir.Value:
    """The same values in float arithmetic, which no engine mistakes for integers."""
    return emit.op("Mul", codes(emit, x, name, scale, bits), emit.constant(f"{name}.scale", np.float32(scale)))


def codes(emit: Emitter, x: ir.Value, name: str, scale: np.float32, bits: int) -> ir.Value:
    """clip(round(x / s), -q, q - 1) in float arithmetic."""
    low, high = code_range(bits)
    rounded = emit.op("Round", emit.op("Div", x, emit.constant(f"{name}.scale", np.float32(scale))))
    return emit.op(
        "Clip", rounded, emit.constant(f"{name}.low", np.float32(low)), emit.constant(f"{name}.high", np.float32(high))
    )
