"""The two products of attention and the softmax between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from torch import nn

from tqdit.card import AttentionForm
from tqdit.export.passes.emit import Emitter, quantize_dequantize, simulate
from tqdit.export.passes.fused_attention import fuse_attention
from tqdit.export.passes.groups import RowGroups, Step
from tqdit.export.passes.scopes import Modules
from tqdit.models.products import Scores, ValueProduct
from tqdit.plugins.multi_region_softmax.schema import OP_TYPE
from tqdit.quantization.table import PerTimestepGroup, ScaleTable, Site, Symmetric, TwoRegionSoftmax

RANK = 4  # of q, k, v and the probabilities
Quantize = Callable[[Emitter, ir.Value, str, np.float32, int], ir.Value]


def quantize_attention(
    model: ir.Model, network: nn.Module, table: ScaleTable, groups: RowGroups, form: AttentionForm
) -> None:
    """Requires: a float trace whose scores and value products are one MatMul each, with a Softmax between them.

    Ensures: operands are quantized as the table says, in the order of operations of docs/scale-table.md.
    form 'simulated': the rounding is float arithmetic and the products stay float.
    form 'fused': the same values, with one MultiRegionAttention for both products where the softmax has two regions.
    form 'integer': operands pass Q/DQ; two-region probabilities are split at their boundary into two products with one
    integer v, whose sum equals the simulated product up to rounding.
    """
    quantize: Quantize = quantize_dequantize if form == "integer" else simulate
    modules = Modules(model)
    fused = _fuse(model, modules, table, groups) if form == "fused" else set()
    for name, sites in table.by_module.items():
        module = network.get_submodule(name)
        if name in fused:
            continue
        if isinstance(module, Scores):
            _quantize_scores(model.graph, modules.one(name, "MatMul"), name, sites, groups, quantize)
        elif isinstance(module, ValueProduct):
            _quantize_value_product(model.graph, modules.one(name, "MatMul"), name, sites, groups, quantize)


def _fuse(model: ir.Model, modules: Modules, table: ScaleTable, groups: RowGroups) -> set[str]:
    """Fuse every attention whose softmax has two regions; returns the modules that are done with."""
    done = set()
    for name, sites in table.by_module.items():
        left = sites["left"].quantizer if "left" in sites else None
        if isinstance(left, TwoRegionSoftmax):
            done |= {name, fuse_attention(model.graph, modules.one(name, "MatMul"), name, left, table, groups)}
    return done


def _quantize_scores(
    graph: ir.Graph, node: ir.Node, name: str, sites: Mapping[str, Site], groups: RowGroups, quantize: Quantize
) -> None:
    """q^ k^T * r_q * r_k; the trace's own Mul by 1 / sqrt(d) follows. k comes transposed, which changes no code."""
    emit = Emitter(graph, node, name)
    left, right = (_symmetric(sites[role]) for role in ("left", "right"))
    steps = Step(left.scale, groups), Step(right.scale, groups)
    operands = []
    for value, role, quantizer, step in zip(node.inputs, ("left", "right"), (left, right), steps, strict=True):
        assert value is not None
        operands.append(quantize(emit, step.divide(emit, value, role, RANK), role, step.reference, quantizer.bits))
    y = emit.op("MatMul", *operands)
    for role, step in zip(("left", "right"), steps, strict=True):
        y = step.multiply(emit, y, role, RANK)
    _replace(graph, node, y)


def _quantize_value_product(
    graph: ir.Graph, node: ir.Node, name: str, sites: Mapping[str, Site], groups: RowGroups, quantize: Quantize
) -> None:
    """P^ v^ * r_v."""
    emit = Emitter(graph, node, name)
    probabilities, v = node.inputs
    assert probabilities is not None
    assert v is not None
    right = _symmetric(sites["right"])
    right_step = Step(right.scale, groups)
    v = quantize(emit, right_step.divide(emit, v, "right", RANK), "right", right_step.reference, right.bits)
    left = sites["left"].quantizer
    if isinstance(left, TwoRegionSoftmax):
        quantized = _multi_region_softmax(graph, probabilities, name, left, groups)
        simulated = quantize is simulate
        y = emit.op("MatMul", quantized, v) if simulated else _two_products(emit, quantized, v, left, groups)
    else:
        assert isinstance(left, Symmetric)
        step = Step(left.scale, groups)
        p = quantize(emit, step.divide(emit, probabilities, "left", RANK), "left", step.reference, left.bits)
        y = step.multiply(emit, emit.op("MatMul", p, v), "left", RANK)
    _replace(graph, node, right_step.multiply(emit, y, "right", RANK))


def _multi_region_softmax(
    graph: ir.Graph, probabilities: ir.Value, name: str, quantizer: TwoRegionSoftmax, groups: RowGroups
) -> ir.Value:
    """Replace the Softmax that makes `probabilities` by MultiRegionSoftmax."""
    softmax = probabilities.producer()
    assert softmax is not None
    assert softmax.op_type == "Softmax"
    emit = Emitter(graph, softmax, f"{name.rpartition('.')[0]}.softmax")
    scores = softmax.inputs[0]
    assert scores is not None
    if isinstance(quantizer.granularity, PerTimestepGroup):
        low_step = groups.select(emit, "low_step", quantizer.low_step, rank=1)
    else:
        low_step = emit.constant("low_step", quantizer.low_step.reshape(1))
    quantized = emit.custom(OP_TYPE, scores, low_step, bits=quantizer.bits, high_step=float(quantizer.high_step))
    _replace(graph, softmax, quantized)
    return quantized


def _two_products(
    emit: Emitter, probabilities: ir.Value, v: ir.Value, quantizer: TwoRegionSoftmax, groups: RowGroups
) -> ir.Value:
    """Low and high region, each as int8 times the integer v.

    A quantized probability is of the low region where it is at most (q - 1/2) s1: the largest low value is (q - 1) s1,
    the smallest high one at least q s1.
    """
    step = Step(quantizer.low_step, groups)
    half = np.float32((1 << (quantizer.bits - 1)) - 0.5)
    bound = (quantizer.low_step * half).astype(np.float32)
    if step.grouped:
        boundary = groups.select(emit, "left.boundary", bound, RANK)
    else:
        boundary = emit.constant("left.boundary", bound)
    zero = emit.constant("left.zero", np.float32(0))
    is_low = emit.op("LessOrEqual", probabilities, boundary)
    low = step.divide(emit, emit.op("Where", is_low, probabilities, zero), "left.low", RANK)
    low = quantize_dequantize(emit, low, "left.low", step.reference, quantizer.bits)
    high = emit.op("Where", is_low, zero, probabilities)
    high = quantize_dequantize(emit, high, "left.high", np.float32(quantizer.high_step), quantizer.bits)
    y = step.multiply(emit, emit.op("MatMul", low, v), "left.low", RANK)
    return emit.op("Add", y, emit.op("MatMul", high, v))


def _symmetric(site: Site) -> Symmetric:
    assert isinstance(site.quantizer, Symmetric)
    return site.quantizer


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    node.outputs[0].replace_all_uses_with(value)
    graph.remove(node, safe=True)
