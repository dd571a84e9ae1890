"""Casting what is not integer to float16 or bfloat16, for backends that like it (`--float-type`).

An exported file stays float32; a builder calls this pass on it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from tqdit.card import GraphCard
from tqdit.errors import UsageError
from tqdit.graph_names import scope_of
from tqdit.plugins import DOMAIN
from tqdit.plugins.multi_region_attention import schema as multi_region_attention
from tqdit.plugins.multi_region_integer_attention import schema as multi_region_integer_attention
from tqdit.plugins.multi_region_numerator import schema as multi_region_numerator
from tqdit.plugins.multi_region_numerator_attention import schema as multi_region_numerator_attention
from tqdit.plugins.multi_region_numerator_integer_attention import schema as multi_region_numerator_integer_attention
from tqdit.plugins.multi_region_softmax import schema as multi_region_softmax

FloatType = Literal["fp16", "bf16"]
DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
FLOAT32 = ir.DataType.FLOAT
LARGEST_FLOAT16 = 65504.0
MASK = 1e30
NO_BFLOAT16 = {"Conv"}  # in opset 20
ATTENTIONS = {multi_region_attention.OP_TYPE, multi_region_numerator_attention.OP_TYPE}
QKV = 3  # of their inputs take the network's type; mask and low scale stay float32
# Their inputs stay int8 and float32; a result that is not int8 takes the network's type, which an attribute says.
INTEGER_ATTENTIONS = {multi_region_integer_attention.OP_TYPE, multi_region_numerator_integer_attention.OP_TYPE}
OUT_TYPE = "out_type"
SOFTMAXES = {"Softmax", multi_region_softmax.OP_TYPE, multi_region_numerator.OP_TYPE}
MASKING = {"Add", "Where"}  # of scores, with values such as -1e30


def cast_floats(model: ir.Model, card: GraphCard, float_type: FloatType) -> None:
    """Requires: a float32 file of ours, with scopes in the nodes' metadata.

    Ensures: the network computes in `float_type`, except for islands of float32: quantized products from the scaling of
    their input to the bias (integer accumulators exceed 65504 before they are scaled), rounded softmaxes and the masks
    of their scores, the angles of the timestep, and the sampling step. Inputs and outputs keep their types; functions
    and Q/DQ see float32 only, except for the attention ops, whose result has `float_type` if it is no int8, and so have
    their q, k and v (integer codes are exact in it).
    Raises UsageError if a constant does not fit into float16.
    """
    ShapeInferencePass()(model)  # types of the values that our passes added
    islands = _islands(card)
    _Caster(model.graph, islands, _angles(model.graph), DTYPES[float_type]).run()
    RemoveUnusedNodesPass()(model)  # float32 constants that only had users in the other type


def _islands(card: GraphCard) -> frozenset[str]:
    """The modules of the quantized products."""
    return frozenset() if card.quantization is None else card.quantization.quantized


def _angles(graph: ir.Graph) -> frozenset[int]:
    """Ids of the nodes that make angles, up to Sin and Cos: their arguments, back to the inputs of the graph.

    A timestep of 999 has no neighbour closer than 4 in bfloat16.
    """
    stack = [node for node in graph if node.op_type in ("Sin", "Cos")]
    found: set[int] = set()
    while stack:
        node = stack.pop()
        if id(node) not in found:
            found.add(id(node))
            makers = (value.producer() for value in node.inputs if value is not None)
            stack += [maker for maker in makers if maker is not None]
    return frozenset(found)


class _Caster:
    def __init__(self, graph: ir.Graph, islands: Collection[str], angles: Collection[int], target: ir.DataType) -> None:
        self.graph, self.islands, self.angles, self.target = graph, islands, angles, target
        self._casts: dict[tuple[int, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        small = [node for node in self.graph if self._is_cast_down(node)]
        own = [node for node in self.graph if node.domain == DOMAIN]
        fused = [node for node in own if node.op_type in ATTENTIONS | INTEGER_ATTENTIONS]
        chosen = {id(node) for node in small}
        mixed = {id(node) for node in fused if node.op_type in ATTENTIONS}
        low = {id(value) for node in (*small, *fused) for value in node.outputs if value.dtype == FLOAT32}
        for node in list(self.graph):
            for index, value in enumerate(node.inputs):
                if value is None or value.dtype != FLOAT32:
                    continue
                is_low = id(node) in chosen or (id(node) in mixed and index < QKV)
                wanted = self.target if is_low else FLOAT32
                have = self.target if id(value) in low else FLOAT32
                if have != wanted:
                    node.replace_input_with(index, self._converted(value, wanted, node))
        for value in self.graph.outputs:
            assert id(value) not in low, "outputs are made by the sampling step or by the last product"
        for node in (*small, *fused):
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", int(self.target))
            for value in node.outputs:
                if value.dtype == FLOAT32:
                    value.dtype = self.target
                    if OUT_TYPE in node.attributes:
                        node.attributes[OUT_TYPE] = ir.AttrInt64(OUT_TYPE, int(self.target))

    def _is_cast_down(self, node: ir.Node) -> bool:
        scope = scope_of(node)
        if not scope or scope in self.islands or node.domain:  # no scope: the sampling step around the network
            return False
        if self._is_rounded_softmax(node):
            return False
        if node.op_type in MASKING and any(self._is_rounded_softmax(user) for user, _ in node.outputs[0].uses()):
            return False
        if self.target == ir.DataType.BFLOAT16 and node.op_type in NO_BFLOAT16:
            return False
        if id(node) in self.angles or any(value.is_graph_output() for value in node.outputs):
            return False
        if node.op_type != "Cast" and not any(value is not None and value.dtype == FLOAT32 for value in node.inputs):
            return False  # it makes float32 by itself, such as ConstantOfShape
        return any(value.dtype == FLOAT32 for value in node.outputs)

    def _is_rounded_softmax(self, node: ir.Node) -> bool:
        """Whether a quantized product takes its probabilities."""
        users = (user for user, _ in node.outputs[0].uses())
        return node.op_type in SOFTMAXES and any(scope_of(user) in self.islands for user in users)

    def _converted(self, value: ir.Value, wanted: ir.DataType, user: ir.Node) -> ir.Value:
        """The value in the other type: a converted constant, or a Cast behind the node that makes it."""
        key = (id(value), wanted)
        if key not in self._casts:
            self._casts[key] = (
                self._constant(value, wanted) if value.is_initializer() else self._cast(value, wanted, user)
            )
        return self._casts[key]

    def _constant(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        assert value.const_value is not None
        array = value.const_value.numpy()
        if wanted == ir.DataType.FLOAT16:  # float32's lowest number stands for a masked score, as float16's does
            array = np.where(np.abs(array) >= MASK, np.copysign(LARGEST_FLOAT16, array), array)
        if wanted == ir.DataType.FLOAT16 and np.abs(array).max(initial=0) > LARGEST_FLOAT16:
            raise UsageError(
                f"'{value.name}' holds {np.abs(array).max():.3g}, beyond float16's {LARGEST_FLOAT16:g}. "
                "Use --float-type bf16 or fp32."
            )
        name = f"{value.name}.{wanted.name.lower()}"
        tensor = ir.tensor(array.astype(wanted.numpy()), dtype=wanted, name=name)
        made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(wanted), const_value=tensor)
        self.graph.register_initializer(made)
        return made

    def _cast(self, value: ir.Value, wanted: ir.DataType, user: ir.Node) -> ir.Value:
        node = ir.node("Cast", [value], {"to": int(wanted)}, name=f"{value.name}/to_{wanted.name.lower()}")
        made = node.outputs[0]
        made.name, made.type, made.shape = f"{node.name}:0", ir.TensorType(wanted), value.shape
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(user, node)
        else:
            self.graph.insert_after(producer, node)
        return made
