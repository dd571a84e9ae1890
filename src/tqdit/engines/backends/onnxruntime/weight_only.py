"""Float inputs of int8 weights as int8 digits: the product is one of integers and equals that of floats.

Layers of the conditioning have one row an image, and weights that are as large as those of the tokens' layers. The time
of their products is that of reading the weight, and int8 is a quarter of float32, which ONNX Runtime would make of it
when the engine is opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tqdit.engines.backends.onnxruntime.editing import DOMAIN, INTEGER_PRODUCT, MIDDLE, Editor, make_node
from tqdit.graph_names import scope_of

DIGIT, STEP = 127, 254  # a float is up to 127 units, and as many of 1/254 of one, and so on
DIGITS = 3  # 24 bits, as float32 has
SMALL = 64  # elements of a shape, at most


def write_weight_only_products(model: onnx.ModelProto, weights: Path, modules: Iterable[str]) -> set[str]:
    """Multiply rows of floats by int8 weights as three int8 digits, in place; returns the modules where it was done.

    A row x is max |x| / 127 (d0 + d1 / 254 + d2 / 254^2) with digits of -127..127. The digits are rows of one product.
    weights: the folder of the file's external data.
    """
    editor, rows, written, wanted = Editor(model, weights), _one_row_an_image(model), set[str](), set(modules)
    for node in model.graph.node:
        if scope_of(node) not in wanted or node.op_type != "MatMul" or node.output[0] not in rows:
            continue
        right = editor.makers.get(node.input[1])
        if right is None or right.op_type != "DequantizeLinear" or not editor.is_for(right, node):
            continue
        if editor.is_int8_weight(right):
            editor.replaced |= {id(right): [], id(node): _digits(editor, node, right)}
            written.add(scope_of(node))
    if written:
        editor.finish()
    return written


def _one_row_an_image(model: onnx.ModelProto) -> set[str]:
    """Values of shape (batch, channels)."""
    light, graph = onnx.ModelProto(opset_import=model.opset_import, functions=model.functions), model.graph
    light.ir_version = model.ir_version
    light.graph.CopyFrom(onnx.GraphProto(name=graph.name, node=graph.node, input=graph.input, output=graph.output))
    for tensor in graph.initializer:
        if math.prod(tensor.dims) > SMALL:  # no shape depends on it
            light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            light.graph.initializer.append(tensor)
    batch = {value.type.tensor_type.shape.dim[0].dim_param for value in graph.input} - {""}
    found = set[str]()
    for info in onnx.shape_inference.infer_shapes(light).graph.value_info:
        sizes = info.type.tensor_type.shape.dim
        if len(sizes) == 2 and (sizes[0].dim_param in batch or sizes[0].dim_value == 1):
            found.add(info.name)
    return found


def _digits(editor: Editor, node: onnx.NodeProto, right: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The nodes of one product. Those of rows that many products read are the same, and ONNX Runtime merges them."""
    rows, made = node.input[0], list[onnx.NodeProto]()

    def constant(name: str, value: Any, dtype: type[np.generic] = np.float32) -> str:
        return editor.constant(f"tqdit.digits.{name}", value, dtype)

    def step(op_type: str, what: str, *inputs: str, **attributes: Any) -> str:
        result = f"{node.name}/{what}"
        made.append(make_node(node, op_type, inputs, result, **attributes))
        return result

    first, middle, one = constant("first", [0], np.int64), constant("middle", MIDDLE, np.uint8), constant("one", 1)
    largest = step("ReduceMax", "largest", step("Abs", "absolute", rows), constant("last", [-1], np.int64))
    # A row of zeros has the digits 0 of any unit.
    unit = step("Max", "unit", step("Mul", "share", largest, constant("share", 1 / DIGIT)), constant("least", 1e-30))
    rest, digits = step("Unsqueeze", "rest", step("Div", "units", rows, unit), first), list[str]()
    for number in range(DIGITS):
        digits.append(step("Round", f"digit.{number}", rest))
        if number < DIGITS - 1:
            rest = step("Sub", f"rest.{number}", rest, digits[-1])
            rest = step("Mul", f"rest.{number}.units", rest, constant("step", STEP))
    codes = step("QuantizeLinear", "codes", step("Concat", "digits", *digits, axis=0), one, middle)
    inputs = [codes, right.input[0], one, right.input[1], middle, constant("zero", 0, np.int8)]
    parts = f"{node.name}/parts"
    made.append(make_node(node, INTEGER_PRODUCT, inputs, parts, node.name, domain=DOMAIN))
    powers = constant("powers", [[[float(STEP) ** -number]] for number in range(DIGITS)])
    total = step("ReduceSum", "sum", step("Mul", "powers", parts, powers), first, keepdims=0)
    made.append(make_node(node, "Mul", [total, unit], node.output[0], f"{node.name}/result"))
    return made
