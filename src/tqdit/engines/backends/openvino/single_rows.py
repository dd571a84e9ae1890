"""A row has the same bits alone and in a batch: OpenVINO sums a single row in another order if the weights are int8."""

from __future__ import annotations

from types import ModuleType
from typing import Any

SCALING = {"Convert", "Multiply", "Subtract", "Reshape", "Transpose"}  # between integers and a product
INTEGERS = {"i4", "u4", "i8", "u8"}


def widen_single_rows(ov: ModuleType, model: Any) -> None:
    """Products of float rows (N, K) with int8 weights compute their first row twice: N + 1 rows are never one.

    These are the conditioning's, whose weights are read once whatever N is. Integer products are exact in any order.
    """
    op = ov.opset8
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or not _is_weight_only(node):
            continue
        x, last = node.input_value(0), _with_bias(node)
        readers = last.output(0).get_target_inputs()
        node.input(0).replace_source_output(op.concat([x, _rows(op, x, 0, 1)], 0).output(0))
        rows = _rows(op, last.output(0), 0, -1).output(0)
        for reader in readers:
            reader.replace_source_output(rows)
    model.validate_nodes_and_infer_types()


def _is_weight_only(product: Any) -> bool:
    shape = product.input_value(0).get_partial_shape()
    if shape.rank.is_dynamic or len(shape) != 2 or shape[0].is_static:
        return False
    weight = _origin(product, 1)
    is_integer = weight.get_type_name() == "Constant" and weight.get_element_type().get_type_name() in INTEGERS
    return is_integer and _origin(product, 0).get_type_name() != "FakeQuantize"


def _origin(product: Any, index: int) -> Any:
    """What makes an input, before scaling."""
    node = product.input_value(index).get_node()
    while node.get_type_name() in SCALING:
        node = node.input_value(0).get_node()
    return node


def _with_bias(product: Any) -> Any:
    """The sum with a constant that is the only reader of a product, or the product itself."""
    readers = [reader.get_node() for reader in product.output(0).get_target_inputs()]
    if len(readers) != 1 or readers[0].get_type_name() != "Add":
        return product
    parts = [value.get_node().get_type_name() for value in readers[0].input_values()]
    return readers[0] if "Constant" in parts else product


def _rows(op: Any, x: Any, start: int, stop: int) -> Any:
    """x[start:stop]."""
    return op.slice(x, *(op.constant([value]) for value in (start, stop, 1, 0)))
