"""Integer products that write float16.

    DQ(x; s) DQ(W; t), float32   ->   DQ(x; 2^-a) DQ(W; 2^-b), float16   *   s t 2^(a + b), float32

An exported file scales its integers in float32, and the compiler writes exactly that: a product's raw integers as
float32, four bytes each, for the next kernel to scale. With powers of two as scales of its operands a product writes
float16, half of the bytes, and the next kernel scales in float32 as before, so this kernel stays one.

The sum of K products of two codes is an integer of at most K 2^14, so a + b is chosen such that K 2^(14 - a - b) is at
most float16's largest number: nothing overflows. A multiple of 2^-24 has no exponent that is too small for float16 either. So each
result is rounded once, by at most 2^-11 of itself, and no scale of the table changes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tqdit.graph_names import SCOPE_KEY, scope_of

LARGEST = 65504.0  # of float16
LARGEST_CODE = 128  # of int8, in magnitude
MOST_BITS = 24  # 2^-24 is the least float16


def halve_products(model: onnx.ModelProto, folder: Path, kept: Collection[str] = ()) -> int:
    """Requires: a file of ours with float16 around its integers. `folder` is where external data lies.

    Ensures: each product of two int8 operands, but for those of the modules `kept`, writes float16. Changes the model in
    place; returns the number of products. One whose K is not known, or beyond 10^6, is left as it was.
    """
    return _Halver(model, folder).run(kept)


def shift_bits(length: int) -> int:
    """a + b for sums of `length` products of two codes."""
    return max(0, math.ceil(math.log2(length * LARGEST_CODE**2 / LARGEST)))


class _Halver:
    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self.graph, self.folder = model.graph, folder
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.makers = {output: node for node in self.graph.node for output in node.output}
        self.lengths = {value.name: _last(value) for value in self.graph.value_info}

    def run(self, kept: Collection[str]) -> int:
        nodes: list[NodeProto] = []
        halved = 0
        for node in self.graph.node:
            made = list(self._halved(node)) if node.op_type == "MatMul" and scope_of(node) not in kept else []
            nodes += made or [node]
            halved += bool(made)
        used = {name for node in nodes for name in node.input}
        del self.graph.node[:]
        self.graph.node.extend(node for node in nodes if node.op_type != "DequantizeLinear" or node.output[0] in used)
        return halved

    def _halved(self, product: NodeProto) -> Iterator[NodeProto]:
        """What takes the place of a product; nothing if it stays as it is."""
        operands = [self.makers.get(name) for name in product.input]
        scales = [self._scale(node) for node in operands]
        left, right = scales
        length = self._length(product)
        if left is None or right is None or length is None or (bits := shift_bits(length)) > MOST_BITS:
            return
        scope = scope_of(product)
        names = []
        for node, share in zip(operands, (bits // 2, bits - bits // 2), strict=True):
            assert node is not None
            name = f"{product.name}/half.{len(names)}"
            scale = self._constant(f"{name}.scale", np.float16(2.0**-share))
            zero_point = node.input[2:]
            yield _node("DequantizeLinear", [node.input[0], scale, *zero_point], name, scope)
            names.append(name)
        (result,) = product.output
        true_scale = (left.astype(np.float64) * right * 2.0**bits).astype(np.float32)
        half = helper.make_node("MatMul", names, [f"{result}/half"], product.name)
        half.metadata_props.extend(product.metadata_props)
        yield half
        wide = _node("Cast", half.output, f"{product.name}/half.wide", scope, to=TensorProto.FLOAT)
        yield wide
        scaled = _node("Mul", [*wide.output, self._constant(f"{product.name}/half.scale", true_scale)],
                       f"{product.name}/half.scaled", scope)  # fmt: skip
        scaled.output[0] = result
        yield scaled

    def _scale(self, node: NodeProto | None) -> NDArray[np.float32] | None:
        """The constant scale of a DequantizeLinear to float32: a number, or one for each column of a weight."""
        if node is None or node.op_type != "DequantizeLinear" or node.input[1] not in self.constants:
            return None
        scale = numpy_helper.to_array(self.constants[node.input[1]], str(self.folder))
        if scale.dtype != np.float32 or (scale.ndim and node.input[0] not in self.constants):
            return None
        columns = not scale.ndim or all(attribute.i == 1 for attribute in node.attribute if attribute.name == "axis")
        return scale if columns else None

    def _length(self, product: NodeProto) -> int | None:
        """K."""
        weight = self.makers.get(product.input[1])
        if weight is not None and weight.input[0] in self.constants:
            return int(self.constants[weight.input[0]].dims[0])
        return self.lengths.get(product.input[0])

    def _constant(self, name: str, array: NDArray[np.generic] | np.generic) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        return name


def _node(op_type: str, inputs: Collection[str], name: str, scope: str, **attributes: int) -> NodeProto:
    node = helper.make_node(op_type, inputs, [name], name, **attributes)
    node.metadata_props.add(key=SCOPE_KEY, value=scope)
    return node


def _last(value: onnx.ValueInfoProto) -> int | None:
    """The last dimension, if it is a number."""
    shape = value.type.tensor_type.shape.dim
    return shape[-1].dim_value or None if shape else None
