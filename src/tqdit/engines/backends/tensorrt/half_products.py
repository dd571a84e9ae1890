"""Quantized products that write float16 or bfloat16.

    DQ(x; s) DQ(W; t), float32   ->   DQ(x; 2^-a) DQ(W; 2^-b), float16   *   s t 2^(a + b), float32

An exported file scales in float32, and the compiler takes it at its word: a product writes its raw integers as float32,
four bytes each, and the next kernel scales them. With powers of two as scales of its operands a product writes float16,
half of the bytes, and the next kernel scales in float32 as before, so the number of kernels stays the same.

Where |x| <= X and |W| <= Y in codes, the sum of K products is at most K X Y. a + b is chosen so that K X Y 2^-(a + b)
is at most float16's largest number: nothing overflows. The sum is an integer, and a multiple of 2^-24 has no exponent
that is too small for float16. So a result is rounded once, by at most 2^-11 of itself, and no scale of the table
changes. Of E4M3 operands (X = Y = 448) sums below 1 may lose more. bfloat16 takes the same form and rounds by 2^-9.

Simulated products of attention, whose codes are floats, take the same form. Probabilities in two regions, at most 1,
are rounded, too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tqdit.graph_names import SCOPE_KEY, scope_of
from tqdit.plugins.multi_region_numerator.schema import OP_TYPE as MULTI_REGION_NUMERATOR
from tqdit.plugins.multi_region_softmax.schema import OP_TYPE as MULTI_REGION_SOFTMAX

LARGEST = 65504.0  # of float16
LARGEST_CODE = 128  # of int8, in magnitude
LARGEST_FP8 = 448
MOST_BITS = 24  # 2^-24 is the least float16
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def probabilities(model: onnx.ModelProto) -> frozenset[str]:
    """Names of values that a custom op rounded in two regions; they outlive the inlining of functions."""
    softmaxes = (MULTI_REGION_SOFTMAX, MULTI_REGION_NUMERATOR)
    return frozenset(node.output[0] for node in model.graph.node if node.op_type in softmaxes)


def halve_products(
    model: onnx.ModelProto, folder: Path, rounded: Collection[str], float_type: str = "fp16", kept: Collection[str] = ()
) -> int:
    """Requires: a file of ours with `float_type` (fp16 or bf16) around its float32 islands; `rounded` are its
    `probabilities`, `folder` is where external data lies.

    Ensures: each product of two quantized operands, except those of the modules `kept`, writes `float_type`. Changes
    the model in place; returns the number of products. One whose K is not known stays as it was.
    """
    return _Halver(model, folder, rounded, TYPES[float_type]).run(kept)


def shift_bits(length: int, left: float = LARGEST_CODE, right: float = LARGEST_CODE) -> int:
    """a + b for sums of `length` products of operands with these largest magnitudes."""
    return max(0, math.ceil(math.log2(length * left * right / LARGEST)))


@dataclass(frozen=True)
class _Operand:
    """`scale` times integers of at most `largest` in magnitude, or probabilities (scale 1, largest 1)."""

    codes: str  # int8 or float32
    scale: NDArray[np.float32]
    largest: int = LARGEST_CODE
    zero_point: tuple[str, ...] | None = None  # of int8; None: the codes are float32


class _Halver:
    def __init__(self, model: onnx.ModelProto, folder: Path, rounded: Collection[str], kind: int) -> None:
        self.graph, self.folder, self.rounded, self.kind = model.graph, folder, rounded, kind
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
        nodes = [node for node in nodes if node.op_type != "DequantizeLinear" or node.output[0] in used]
        used = {name for node in nodes for name in node.input}
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        for index in reversed(range(len(self.graph.initializer))):  # one by one: the others are large
            if self.graph.initializer[index].name not in used:
                del self.graph.initializer[index]
        return halved

    def _halved(self, product: NodeProto) -> Iterator[NodeProto]:
        """What takes the place of a product; nothing if it stays as it is."""
        left, right = (self._operand(name) for name in product.input)
        length = self._length(product)
        if left is None or right is None or length is None or (left.largest == right.largest == 1):
            return
        bits = shift_bits(length, left.largest, right.largest)
        if bits > MOST_BITS:
            return
        share = 0 if left.largest == 1 else bits if right.largest == 1 else bits // 2
        (result,), scope, name = product.output, scope_of(product), f"{product.name}/half"
        yield from self._enter(left, share, f"{name}.left", scope)
        yield from self._enter(right, bits - share, f"{name}.right", scope)
        half = helper.make_node("MatMul", [f"{name}.left", f"{name}.right"], [name], product.name)
        half.metadata_props.extend(product.metadata_props)
        scale = (left.scale.astype(np.float64) * right.scale * 2.0**bits).astype(np.float32)
        scaled = _node("Mul", [f"{name}.wide", self._constant(f"{name}.scale", scale)], f"{name}.scaled", scope)
        scaled.output[0] = result
        yield from (half, _node("Cast", [name], f"{name}.wide", scope, to=TensorProto.FLOAT), scaled)

    def _enter(self, operand: _Operand, share: int, name: str, scope: str) -> Iterator[NodeProto]:
        """The operand's codes times 2^-share."""
        codes, unit = operand.codes, 2.0**-share
        if operand.zero_point is not None:
            self.graph.initializer.append(helper.make_tensor(f"{name}.unit", self.kind, [], [unit]))
            yield _node("DequantizeLinear", [codes, f"{name}.unit", *operand.zero_point], name, scope)
            return
        if share:
            yield _node("Mul", [codes, self._constant(f"{name}.unit", np.float32(unit))], f"{name}.small", scope)
            codes = f"{name}.small"
        yield _node("Cast", [codes], name, scope, to=self.kind)

    def _operand(self, name: str) -> _Operand | None:
        """What a value consists of; None if it is no quantized operand in float32."""
        if name in self.rounded:
            return _Operand(name, np.ones((), np.float32), 1)
        node = self.makers.get(name)
        if node is None:
            return None
        scale = self._value(node.input[1]) if node.op_type in ("DequantizeLinear", "Mul") else None
        if scale is None or scale.dtype != np.float32:
            return None
        if node.op_type == "Mul":
            return _Operand(node.input[0], scale) if not scale.ndim and self._are_codes(node.input[0]) else None
        columns = node.input[0] in self.constants and all(each.i == 1 for each in node.attribute if each.name == "axis")
        if scale.ndim and not columns:
            return None
        return _Operand(node.input[0], scale, self._largest(node.input[0]), tuple(node.input[2:]))

    def _largest(self, codes: str) -> int:
        """The largest magnitude of int8, or of E4M3."""
        quantize = self.makers.get(codes)
        typed = self.constants.get(quantize.input[2] if quantize is not None and len(quantize.input) > 2 else codes)
        return LARGEST_FP8 if typed is not None and typed.data_type == TensorProto.FLOAT8E4M3FN else LARGEST_CODE

    def _are_codes(self, name: str) -> bool:
        """Whether a value is clip(round(..)) with bounds of int8."""
        clip = self.makers.get(name)
        if clip is None or clip.op_type != "Clip" or len(clip.input) != 3:
            return False
        rounding, bounds = self.makers.get(clip.input[0]), [self._value(bound) for bound in clip.input[1:]]
        return (rounding is not None and rounding.op_type == "Round"
                and all(bound is not None and abs(float(bound)) <= LARGEST_CODE for bound in bounds))  # fmt: skip

    def _length(self, product: NodeProto) -> int | None:
        """K."""
        weight = self.makers.get(product.input[1])
        if weight is not None and weight.input[0] in self.constants:
            return int(self.constants[weight.input[0]].dims[0])
        return self.lengths.get(product.input[0])

    def _value(self, name: str) -> NDArray[np.float32] | None:
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor, str(self.folder))

    def _constant(self, name: str, array: NDArray[np.generic] | np.generic) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        return name


def _node(op_type: str, inputs: Sequence[str], name: str, scope: str, to: int | None = None) -> NodeProto:
    node = helper.make_node(op_type, inputs, [name], name, to=to)
    node.metadata_props.add(key=SCOPE_KEY, value=scope)
    return node


def _last(value: onnx.ValueInfoProto) -> int | None:
    """The last dimension, if it is a number."""
    sizes = value.type.tensor_type.shape.dim
    return sizes[-1].dim_value or None if sizes else None
