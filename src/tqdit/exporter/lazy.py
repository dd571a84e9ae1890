"""Initializers whose values are made when they are written, so that a graph holds no copy of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from tqdit.models import weights as stored
from tqdit.models.weights import Weights


def lazy(name: str, shape: Sequence[int], dtype: DTypeLike, make: Callable[[], NDArray[Any]]) -> ir.LazyTensor:
    """A tensor of this shape and type that `make` returns, once for each reader."""
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    return ir.LazyTensor(lambda: ir.tensor(np.ascontiguousarray(make())), kind, ir.Shape(shape), name=name)


def read_from(weights: Weights, graph: ir.Graph) -> None:
    """Requires: a graph as torch's exporter makes it. Ensures: values that lie in a file are read when needed."""
    for value in graph.initializers.values():
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, Tensor) and raw in weights:
            assert value.name is not None
            value.const_value = _reader(weights, raw, value.name)


def transpose_weights(graph: ir.Graph) -> None:
    """Ensures: a large transposed initializer that nothing else uses is an initializer, made when it is read.

    torch's optimizer would do the same for those of any size, in memory.
    """
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.name or weight.name not in graph.initializers or len(weight.uses()) != 1:
            continue
        tensor, output = weight.const_value, node.outputs[0]
        if tensor is None or tensor.size < stored.LARGE or output.is_graph_output():
            continue
        transposed = _transposed(tensor, node.attributes["perm"].as_ints(), output.name or "")
        value = ir.Value(name=output.name, type=weight.type, shape=ir.Shape(transposed.shape), const_value=transposed)
        output.replace_all_uses_with(value)
        graph.remove(node, safe=True)
        graph.initializers.pop(weight.name)
        graph.register_initializer(value)


def _reader(weights: Weights, raw: Tensor, name: str) -> ir.LazyTensor:
    return lazy(name, raw.shape, np.float32, lambda: weights.read(raw).numpy())


def _transposed(tensor: ir.TensorProtocol, order: Sequence[int], name: str) -> ir.LazyTensor:
    shape = [int(str(tensor.shape[axis])) for axis in order]
    return lazy(name, shape, tensor.dtype.numpy(), lambda: tensor.numpy().transpose(order))
