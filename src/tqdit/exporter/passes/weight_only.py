"""Weights of a float graph as int8, one scale for each output channel; the products stay float.

For graphs without a scale table: text encoders, whose activations were not calibrated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tqdit.exporter.passes.emit import Emitter, dequantize

LEAST = 1 << 12  # elements; smaller weights stay float
STEPS = 127  # of the largest value of a channel


def round_weights(model: ir.Model) -> int:
    """Requires: float32 weights as initializers. Ensures: large ones of MatMul and Gemm are int8 behind a
    DequantizeLinear. Changes the model in place; returns how many weights it rounded.
    """
    rounded = 0
    for weight in list(model.graph.initializers.values()):
        tensor, uses = weight.const_value, list(weight.uses())
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2 or tensor.size < LEAST:
            continue
        if not uses or not all(use.node.op_type in ("MatMul", "Gemm") and use.idx == 1 for use in uses):
            continue
        for use in uses:
            use.node.replace_input_with(1, _rounded(model.graph, use.node, weight, tensor))
        model.graph.initializers.pop(weight.name or "")
        rounded += 1
    return rounded


def _rounded(graph: ir.Graph, node: ir.Node, weight: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    """The dequantized weight, in front of a node that takes it."""
    transposed = "transB" in node.attributes and node.attributes["transB"].as_int()
    axis, shape = 0 if transposed else 1, [int(str(side)) for side in tensor.shape]
    largest = np.abs(tensor.numpy()).max(1 - axis, keepdims=True)
    scale = np.where(largest > 0, largest / STEPS, 1).astype(np.float32)
    emit = Emitter(graph, node, weight.name or "")
    codes = emit.lazy("codes", shape, np.int8, _codes_of(tensor, scale))
    return dequantize(emit, "codes", codes, scale.reshape(-1), axis)


def _codes_of(tensor: ir.TensorProtocol, scale: NDArray[np.float32]) -> Callable[[], NDArray[np.int8]]:
    return lambda: np.rint(tensor.numpy() / scale).astype(np.int8)
