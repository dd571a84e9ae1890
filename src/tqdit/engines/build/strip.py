"""Taking the quantization of a quantized file away again (`tqdit-build --precision fp32|fp16|bf16`).

So one file serves to compare integers with floats. The weights stay those of the quantized model: what rounding took
from them is not in the file any more. A float file of the original weights is what `tqdit-export --float` writes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from tqdit.card import GraphCard
from tqdit.errors import UsageError
from tqdit.graph_names import SCOPE_KEY, scope_of
from tqdit.plugins import DOMAIN
from tqdit.plugins.multi_region_numerator.schema import OP_TYPE as MULTI_REGION_NUMERATOR
from tqdit.plugins.multi_region_softmax.schema import OP_TYPE as MULTI_REGION_SOFTMAX
from tqdit.plugins.time_group_select.schema import OP_TYPE as TIME_GROUP_SELECT

# What the quantization passes put between an input and its product, and what they put after it.
BEFORE = {"Div", "Sub", "Min", "Max", "Clip", "Round", "Mul", "Where", "QuantizeLinear", "DequantizeLinear"}
AFTER = {"Mul", "Add"}


def strip_quantization(model: ir.Model, card: GraphCard) -> None:
    """Requires: a quantized float32 file of ours, with scopes in the nodes' metadata.

    Ensures: every product multiplies floats, once, with the quantized weights as float initializers; probabilities come
    from a Softmax; no custom op and no Q/DQ node is left. Raises UsageError for a form that it does not know.
    """
    assert card.quantization is not None
    replace_softmaxes(model.graph)
    scopes: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type == "MatMul":
            scopes.setdefault(scope_of(node), []).append(node)
    for module in sorted(card.quantization.quantized):
        if module not in scopes:
            raise UsageError(f"the quantization of '{module}' cannot be stripped. Export the model with --float.")
        strip_product(model.graph, module, scopes[module])
    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)
    RemoveUnusedOpsetsPass()(model)
    left = {
        node.op_type for node in model.graph if node.domain == DOMAIN or node.op_type.lower().endswith("quantizelinear")
    }
    if left:
        raise UsageError(f"{', '.join(sorted(left))} cannot be stripped. Export the model with --float.")


def replace_softmaxes(graph: ir.Graph) -> None:
    """Float probabilities in the place of those that an op rounds by two scales."""
    for node in list(graph):
        if node.op_type in (MULTI_REGION_SOFTMAX, MULTI_REGION_NUMERATOR):
            name, metadata = f"{scope_of(node)}/Softmax", {SCOPE_KEY: scope_of(node)}
            softmax = ir.node("Softmax", [node.inputs[0]], {"axis": -1}, name=name, metadata_props=metadata)
            graph.insert_before(node, softmax)
            node.outputs[0].replace_all_uses_with(softmax.outputs[0])


def strip_product(graph: ir.Graph, module: str, products: list[ir.Node]) -> None:
    """One float product for each call of a module in the place of its quantized ones.

    A module has a product for each call and region; of a call's regions, the first takes the whole input.
    """
    calls = {product_after(product, module): product for product in reversed(products)}  # the sum -> its first region
    weight: ir.Value | None = None
    for number, (out, first) in enumerate(reversed(calls.items()), 1):
        left, right = (_before(value, module) for value in first.inputs)
        if right.is_initializer():
            right = weight = weight or _float_weight(graph, module, right)
        name = f"{module}/MatMul.float" if number == 1 else f"{module}/MatMul_{number}.float"
        node = ir.node("MatMul", [left, right], name=name, metadata_props={SCOPE_KEY: module})
        graph.insert_before(first, node)
        out.replace_all_uses_with(node.outputs[0])


def _before(value: ir.Value | None, module: str) -> ir.Value:
    """The float value that a product's operand was made from."""
    assert value is not None
    node = value.producer()
    while node is not None and scope_of(node) == module and node.op_type in BEFORE:
        # a Where chooses between the value and zero
        candidates = node.inputs[1:] if node.op_type == "Where" else node.inputs[:1]
        chosen = next(
            one for one in candidates if one is not None and (len(candidates) == 1 or not one.is_initializer())
        )
        value, node = chosen, chosen.producer()
    return value


def product_after(product: ir.Node, module: str) -> ir.Value:
    """The value that is the product in floats: behind its ratios, offsets, and the sum over its regions."""
    value = product.outputs[0]
    while len(value.uses()) == 1:
        node = next(iter(value.uses())).node
        other = next((one for one in node.inputs if one is not None and one is not value), None)
        if scope_of(node) != module or node.op_type not in AFTER or other is None or not _is_ours(other, module):
            break
        value = node.outputs[0]
    return value


def _is_ours(value: ir.Value, module: str) -> bool:
    """Whether a factor or a summand comes from quantization and not from the network."""
    node = value.producer()
    if node is None:
        return value.name == f"{module}.input.shift"
    if node.op_type in (TIME_GROUP_SELECT, MULTI_REGION_NUMERATOR):
        return True
    return scope_of(node) == module and node.op_type in {*AFTER, "MatMul", "Max"}  # Max: the scale of each token


def _float_weight(graph: ir.Graph, module: str, stored: ir.Value) -> ir.Value:
    """W^ transposed (K, D) as a float32 initializer."""
    assert stored.const_value is not None
    weight = stored.const_value.numpy().astype(np.float32)
    if stored.name == f"{module}.weight.codes":
        scale = graph.initializers[f"{module}.weight.scale"].const_value
        assert scale is not None
        weight = weight * scale.numpy().astype(np.float32)
    value = ir.Value(name=f"{module}.weight_transposed.float", const_value=ir.tensor(weight))
    value.shape, value.type = ir.Shape(weight.shape), ir.TensorType(ir.DataType.FLOAT)
    graph.register_initializer(value)
    return value
