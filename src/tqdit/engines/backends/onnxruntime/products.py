"""Integer products as ONNX Runtime's own operator, in place of a MatMul with Q/DQ around it.

Its optimizer would fuse that by itself, but into more work: codes of both operands become uint8, for which its kernels
are slower than for uint8 by int8 (1.7 to 6 times on a CPU with AMX), and a constant factor, biases and the offset of an
input stay passes over floats.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from tqdit.engines.backends.onnxruntime.editing import (
    DOMAIN,
    INT8,
    INTEGER_PRODUCT,
    MIDDLE,
    UINT8,
    Editor,
    make_node,
)
from tqdit.graph_names import scope_of

WHOLE = 1e-3  # an integer is at most this far


@dataclass(frozen=True, eq=False)
class _Product:
    """A MatMul and the DequantizeLinear of each operand; right_is_weight: the second is a constant."""

    node: onnx.NodeProto
    left: onnx.NodeProto
    right: onnx.NodeProto
    right_is_weight: bool


def write_products(model: onnx.ModelProto, weights: Path, modules: Collection[str], signed: bool) -> None:
    """Write the products of these modules with their factors and biases, in place. What has another form stays.

    weights: the folder of the file's external data. signed: the CPU adds products of uint8 by int8 without overflow;
    else the second operand becomes uint8, too, for which there are exact kernels. (ONNX Runtime's own option for that,
    session.x64quantprecision, fails on these files with 1.31.) Values differ by float rounding alone.
    """
    editor = Editor(model, weights)
    products = [one for node in model.graph.node if scope_of(node) in modules and (one := _product(editor, node))]
    while kept := _of_known_codes(editor, products, signed):
        if len(kept) == len(products):
            break
        products = kept  # what a product that was left out reads may be no other's
    for one in kept:
        for operand in (one.left,) if signed or one.right_is_weight else (one.left, one.right):
            _become_uint8(editor, operand)
        if not one.right_is_weight:
            _transpose_codes(editor, one.right)
    for one in kept:
        _write(editor, one, signed)
    if kept:
        editor.finish()


def _product(editor: Editor, node: onnx.NodeProto) -> _Product | None:
    """A product of codes with one scale by such codes, or by a weight."""
    if node.op_type != "MatMul":
        return None
    left, right = (editor.makers.get(name) for name in node.input)
    if left is None or right is None or {left.op_type, right.op_type} != {"DequantizeLinear"}:
        return None
    if left.input[0] in editor.constants or not editor.is_scalar(left.input[1]) or len(left.input) == 2:
        return None
    if right.input[0] in editor.constants:
        return _Product(node, left, right, True) if editor.is_int8_weight(right) else None
    plain = len(right.input) > 2 and editor.is_scalar(right.input[1]) and editor.is_symmetric(right)
    return _Product(node, left, right, False) if plain else None


def _of_known_codes(editor: Editor, products: list[_Product], signed: bool) -> list[_Product]:
    """Those whose operands can become uint8 if they must."""
    left, right = {id(one.left) for one in products}, {id(one.right) for one in products}
    return [
        one
        for one in products
        if _can_become_uint8(editor, one.left, left)
        and (signed or one.right_is_weight or _can_become_uint8(editor, one.right, right))
    ]


def _can_become_uint8(editor: Editor, operand: onnx.NodeProto, operands: Collection[int]) -> bool:
    """Whether its codes are uint8, or int8 from a QuantizeLinear (and Clip) that only `operands` read."""
    name, zero = operand.input[0], editor.constants.get(operand.input[2])
    if zero is None or zero.dims or zero.data_type not in (INT8, UINT8):
        return False
    if zero.data_type == UINT8:
        return True
    node = editor.makers.get(name)
    if any(id(reader) not in operands for reader in editor.readers[name]):
        return False
    if node is not None and node.op_type == "Clip" and all(bound in editor.constants for bound in node.input[1:]):
        node = editor.makers.get(node.input[0]) if editor.only_reader(node.input[0]) else None
    return node is not None and node.op_type == "QuantizeLinear" and node.input[2] in editor.constants


def _become_uint8(editor: Editor, operand: onnx.NodeProto) -> None:
    """Let int8 codes be uint8 with the zero point 128."""
    codes = operand.input[0]
    if editor.constants[operand.input[2]].data_type == UINT8:
        return
    for reader in editor.readers[codes]:
        reader.input[2] = editor.uint8(MIDDLE)
    node = editor.makers[codes]
    editor.retyped.add(codes)
    if node.op_type == "Clip":
        editor.retyped.add(node.input[0])
        node.input[1:] = [editor.uint8(int(editor.value(bound)) + MIDDLE) for bound in node.input[1:]]
        node = editor.makers[node.input[0]]
    node.input[2] = editor.uint8(MIDDLE)
    _take_in_offset(editor, node)


def _take_in_offset(editor: Editor, quantize: onnx.NodeProto) -> None:
    """round((x - k s) / s) + 128 is round(x / s) + 128 - k, which saves a pass over floats."""
    before, scale = editor.makers.get(quantize.input[0]), quantize.input[1]
    if before is None or before.op_type != "Sub" or not editor.is_for(before, quantize):
        return
    if not editor.is_scalar(before.input[1]) or not editor.is_scalar(scale):
        return
    offset = float(editor.value(before.input[1]) / editor.value(scale))
    zero = MIDDLE - round(offset)
    if abs(offset - round(offset)) < WHOLE and 0 <= zero <= np.iinfo(np.uint8).max:
        quantize.input[0], quantize.input[2] = before.input[0], editor.uint8(zero)
        editor.removed.add(id(before))


def _transpose_codes(editor: Editor, operand: onnx.NodeProto) -> None:
    """Let a transposed operand be rounded first: its codes are a quarter of the bytes."""
    quantize = editor.makers[operand.input[0]]
    moved = editor.makers.get(quantize.input[0]) if quantize.op_type == "QuantizeLinear" else None
    if moved is None or moved.op_type != "Transpose" or not editor.is_for(moved, quantize):
        return
    value, codes = moved.output[0], quantize.output[0]
    quantize.input[0], quantize.output[0] = moved.input[0], value
    moved.input[0], moved.output[0] = value, codes
    editor.makers |= {value: quantize, codes: moved}
    editor.replaced |= {id(moved): [], id(quantize): [quantize, moved]}
    editor.retyped.add(value)


def _write(editor: Editor, product: _Product, signed: bool) -> None:
    node, left, right = product.node, product.left, product.right
    codes, made = right.input[0], list[onnx.NodeProto]()
    result, factor, biases = _absorbed(editor, node)
    scale, zero = left.input[1], right.input[2] if len(right.input) > 2 else editor.constant("tqdit.int8.0", 0, np.int8)
    if factor != 1:
        scale = editor.constant(f"{node.name}.scale", editor.value(scale) * np.float32(factor), np.float32)
    if product.right_is_weight and not signed:
        codes, zero = f"{node.name}.weight", editor.uint8(MIDDLE)
        made = _weight_as_uint8(editor, product, codes)
    inputs = [left.input[0], codes, scale, right.input[1], left.input[2], zero]
    if len(biases) > 1:
        total = np.sum([editor.value(name) for name in biases], axis=0)
        biases = [editor.constant(f"{node.name}.bias", total, np.float32)]
    written = make_node(node, INTEGER_PRODUCT, inputs + biases, result, node.name, domain=DOMAIN)
    editor.replaced[id(node)] = [*made, written]
    for operand in (left, right):
        readers = editor.readers[operand.output[0]]
        readers[:] = [reader for reader in readers if reader is not node]
        if not readers:
            editor.removed.add(id(operand))


def _weight_as_uint8(editor: Editor, product: _Product, name: str) -> list[onnx.NodeProto]:
    """Nodes that ONNX Runtime computes when it builds."""
    node, types = product.node, onnx.TensorProto
    middle = editor.constant("tqdit.int32.128", MIDDLE, np.int32)
    return [
        make_node(node, "Cast", [product.right.input[0]], f"{name}.wide", to=types.INT32),
        make_node(node, "Add", [f"{name}.wide", middle], f"{name}.sum"),
        make_node(node, "Cast", [f"{name}.sum"], name, to=types.UINT8),
    ]


def _absorbed(editor: Editor, node: onnx.NodeProto) -> tuple[str, float, list[str]]:
    """(result, factor, biases): the module's operations with constants behind a product, which go with it."""
    result, factor, biases = node.output[0], 1.0, list[str]()
    while (reader := editor.only_reader(result)) is not None and scope_of(reader) == scope_of(node):
        others = [name for name in reader.input if name != result]
        if len(others) != 1 or others[0] not in editor.constants:
            break
        (other,) = others
        if reader.op_type == "Mul" and editor.is_scalar(other) and not biases:
            factor *= float(editor.value(other))
        elif reader.op_type == "Add" and len(editor.constants[other].dims) == 1:
            biases.append(other)
        else:
            break
        editor.removed.add(id(reader))
        result = reader.output[0]
    return result, factor, biases
