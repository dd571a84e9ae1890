"""Numbers that the bodies of custom ops compute from their attributes, computed once.

TensorRT-RTX would run the power of two in MultiRegionSoftmax's body, a kernel of its own, in every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

RULES: dict[str, Callable[..., NDArray[Any]]] = {
    "Cast": lambda x: x.astype(np.float32), "Sub": np.subtract, "Pow": np.power,
}  # fmt: skip


def fold_numbers(model: onnx.ModelProto) -> int:
    """Replace nodes whose inputs are single constants by their result, in place; returns how many."""
    known: dict[str, NDArray[Any]] = {}
    folded = 0
    for node in model.graph.node:
        if node.op_type == "Constant":
            value = _value(node)
            if value is not None and not value.shape:
                known[node.output[0]] = value
        elif node.op_type in RULES and node.domain == "" and all(name in known for name in node.input):
            if node.op_type == "Cast" and node.attribute[0].i != TensorProto.FLOAT:
                continue
            made = np.asarray(RULES[node.op_type](*(known[name] for name in node.input)))
            known[node.output[0]] = made
            constant = helper.make_node("Constant", [], node.output, node.name, value=numpy_helper.from_array(made))
            constant.metadata_props.extend(node.metadata_props)
            node.CopyFrom(constant)
            folded += 1
    return folded


def _value(node: onnx.NodeProto) -> NDArray[Any] | None:
    """Of a Constant."""
    (attribute,) = node.attribute
    if attribute.name == "value":
        return numpy_helper.to_array(attribute.t) if not attribute.t.dims else None
    numbers = {"value_float": np.float32, "value_int": np.int64}
    made = numbers.get(attribute.name)
    return None if made is None else np.asarray(helper.get_attribute_value(attribute), made)
