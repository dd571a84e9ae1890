"""A quantizer that an op before it can do: its int8 codes then pass a transpose and a reshape instead of floats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tqdit.plugins import DOMAIN
from tqdit.plugins.time_group_select.schema import OP_TYPE as TIME_GROUP_SELECT
from tqdit.quantization.quantizer import Float32

MOVING = ("Transpose", "Reshape")  # what changes no value


@dataclass(frozen=True)
class FollowingQuantizer:
    """codes = clip(round((x - offset) / scale), -128, 127) of what a value becomes; both () or (G,)."""

    moved: tuple[ir.Value, ...]  # the value as it passes the nodes that move it
    codes: ir.Value
    scale: Float32
    offset: Float32

    def skip(self, codes: ir.Value) -> None:
        """Have `codes`, the value in int8, pass in its place."""
        for value in (codes, *self.moved):
            value.type = ir.TensorType(ir.DataType.INT8)
        self.codes.replace_all_uses_with((codes, *self.moved)[-1])


def following_quantizer(value: ir.Value) -> FollowingQuantizer | None:
    """The 8-bit quantizer that alone takes a value, moved or not; None if there is none, or one of another form.

    Known are constant scales and those of the row's group of timesteps, with an offset or without.
    """
    moved: list[ir.Value] = []
    offset, ratio = np.zeros((), np.float32), np.ones((), np.float32)
    while (node := _only_user(value)) is not None and node.op_type in MOVING:
        value = node.outputs[0]
        moved.append(value)
    for op_type in ("Sub", "Div"):
        if node is not None and node.op_type == op_type:
            numbers = _numbers(node.inputs[1]) if node.inputs[0] is value else None
            if numbers is None:
                return None
            offset, ratio = (numbers, ratio) if op_type == "Sub" else (offset, numbers)
            value = node.outputs[0]
            node = _only_user(value)
    if node is None or node.op_type != "QuantizeLinear" or node.inputs[0] is not value:
        return None
    scale, zero_point = (_numbers(each) for each in (*node.inputs, None)[1:3])  # ONNX's zero point is optional
    if scale is None or scale.ndim or zero_point is None or zero_point.dtype != np.int8 or zero_point:
        return None
    return FollowingQuantizer(tuple(moved), node.outputs[0], np.asarray(scale * ratio, np.float32), offset)


def _only_user(value: ir.Value) -> ir.Node | None:
    users = {id(node): node for node, _ in value.uses()}
    if len(users) != 1 or value.is_graph_output():
        return None
    return next(iter(users.values()))


def _numbers(value: ir.Value | None) -> Float32 | None:
    """A constant number (), or the table (G,) that each row takes its number from."""
    if value is None:
        return None
    node = value.producer()
    if node is not None and node.domain == DOMAIN and node.op_type == TIME_GROUP_SELECT:
        table = node.inputs[2]
        return None if table is None or table.const_value is None else table.const_value.numpy().reshape(-1)
    if value.const_value is None or value.const_value.size != 1:
        return None
    return value.const_value.numpy().reshape(())
