"""The two products of attention and the softmax between them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from torch import nn

from tqdit.card import AttentionForm
from tqdit.exporter.passes.emit import Emitter
from tqdit.exporter.passes.fused_attention import fuse_attention
from tqdit.exporter.passes.groups import GroupSelector
from tqdit.exporter.passes.operands import GraphOperand, multiply, rank_of, replace
from tqdit.exporter.passes.scopes import Modules
from tqdit.models.products import Scores, ValueProduct
from tqdit.quantization.granularity import Role
from tqdit.quantization.quantizer import Rounding
from tqdit.quantization.table import ScaleTable, Site


def quantize_attention(
    model: ir.Model, network: nn.Module, table: ScaleTable, groups: GroupSelector, form: AttentionForm
) -> None:
    """Requires: a float trace whose scores and value products are one MatMul each, with a Softmax between them.

    Ensures: operands are quantized as the table says, in the order of operations of docs/scale-table.md.
    form 'simulated': the rounding is float arithmetic and the products stay float.
    form 'fused': the same values, with one node for both products if a softmax has two regions.
    form 'integer': operands pass Q/DQ; probabilities or numerators in two regions are split at their boundary into two
    products with one integer v, whose sum equals the simulated product up to rounding.
    """
    rounding: Rounding = "integer" if form == "integer" else "simulated"
    modules = Modules(model)
    fused = _fuse(model, modules, table, groups) if form == "fused" else set()
    for name, sites in table.by_module.items():
        module = network.get_submodule(name)
        if isinstance(module, Scores | ValueProduct) and name not in fused:
            # k comes transposed, which changes no code; the trace's own Mul by 1 / sqrt(d) follows the scores
            order: tuple[Role, Role] = ("left", "right") if isinstance(module, Scores) else ("right", "left")
            for node in modules.all(name, "MatMul"):
                _quantize_product(model.graph, node, name, sites, order, groups, rounding)


def _fuse(model: ir.Model, modules: Modules, table: ScaleTable, groups: GroupSelector) -> set[str]:
    """Fuse every attention whose softmax has two regions; returns the modules that are done with."""
    done = set()
    for name, sites in table.by_module.items():
        if "left" in sites and sites["left"].quantizer.softmax is not None:
            nodes = modules.all(name, "MatMul")
            done |= {name} | {fuse_attention(model.graph, node, name, table, groups) for node in nodes}
    return done


def _quantize_product(
    graph: ir.Graph, node: ir.Node, name: str, sites: Mapping[str, Site], order: tuple[Role, Role],
    groups: GroupSelector, rounding: Rounding,
) -> None:  # fmt: skip
    """left^ right^. The operands are added in `order`, in which their nodes are named."""
    emit = Emitter(graph, node, name)
    inputs = dict(zip(("left", "right"), node.inputs, strict=True))
    parts = {}
    for role in order:
        value = inputs[role]
        assert value is not None
        operand = GraphOperand(emit, sites[role].quantizer, role, rank_of(node.outputs[0]), groups, rounding)
        parts[role] = list(operand.parts(value))
    (right,) = parts["right"]  # schemes of the role right have one part
    y = multiply(emit, parts["left"], lambda x: emit.op("MatMul", x, right.values))
    replace(graph, node, y if right.ratio is None else emit.op("Mul", y, right.ratio))
