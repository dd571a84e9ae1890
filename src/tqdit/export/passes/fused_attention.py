"""Attention as one op: scores, rounded softmax and value product become a MultiRegionAttention node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tqdit.errors import UsageError
from tqdit.export.passes.emit import Emitter, codes
from tqdit.export.passes.groups import RowGroups, Step
from tqdit.export.passes.scopes import scope_of
from tqdit.plugins.multi_region_attention.schema import OP_TYPE
from tqdit.quantization.table import PerTimestepGroup, ScaleTable, Site, Symmetric, TwoRegionSoftmax

RANK = 4  # of q, k and v
TRANSPOSED = (0, 1, 3, 2)
LARGEST_FLOAT16 = 65504


@dataclass(frozen=True)
class _Operand:
    """Integer codes, and what they stand for: codes * step * each of the ratios."""

    codes: ir.Value
    step: float
    ratios: tuple[ir.Value, ...]


def fuse_attention(
    graph: ir.Graph, product: ir.Node, name: str, softmax: TwoRegionSoftmax, table: ScaleTable, groups: RowGroups
) -> str:
    """Requires: `product` multiplies a Softmax of scaled scores with v, and stands in the module `name`.

    Ensures: in its place stands one MultiRegionAttention. Quantized q, k and v enter as their integer codes, which are
    exact in float16 and bfloat16 too: constant steps of q and k are part of its scale, those of v multiply its result,
    and steps that follow the timestep multiply the codes of q. Returns the name of the scores' module, whose sites are
    used here.
    """
    probabilities, v = product.inputs
    assert probabilities is not None
    assert v is not None
    _check_range(softmax, name)
    q, k, factor, scores = _scores_of(probabilities, name)
    emit = Emitter(graph, product, name)
    left, right = (_operand(emit, value, table.by_module.get(scores, {}).get(role), role, groups)
                   for value, role in ((q, "left"), (k, "right")))  # fmt: skip
    q = left.codes
    for ratio in (*left.ratios, *right.ratios):
        q = emit.op("Mul", q, ratio)
    values = _operand(emit, v, table.by_module[name]["right"], "value", groups)
    if isinstance(softmax.granularity, PerTimestepGroup):
        low_step = groups.select(emit, "low_step", softmax.low_step, rank=1)
    else:
        low_step = emit.constant("low_step", softmax.low_step.reshape(1))
    y = emit.custom(OP_TYPE, q, right.codes, values.codes, low_step, bits=softmax.bits,
                    high_step=float(softmax.high_step), scale=left.step * right.step * factor)  # fmt: skip
    y = emit.op("Mul", y, emit.constant("value.scale", np.float32(values.step)))
    for ratio in values.ratios:
        y = emit.op("Mul", y, ratio)
    product.outputs[0].replace_all_uses_with(y)
    graph.remove(product, safe=True)
    return scores


def _check_range(softmax: TwoRegionSoftmax, name: str) -> None:
    """Kernels keep probabilities in units of the low step; the largest must fit float16."""
    ratio = float(softmax.high_step) / float(softmax.low_step.min())
    top = (1 << (softmax.bits - 1)) - 1
    if top * ratio > LARGEST_FLOAT16:
        raise UsageError(
            f"'{name}' has a low step {ratio:.0f} times finer than its high step; --attention fused takes up to "
            f"{LARGEST_FLOAT16 / top:.0f} times. Export with --attention simulated."
        )


def _operand(emit: Emitter, x: ir.Value, site: Site | None, name: str, groups: RowGroups) -> _Operand:
    """A tensor without a site is its own code."""
    if site is None:
        return _Operand(x, 1.0, ())
    assert isinstance(site.quantizer, Symmetric)
    step = Step(site.quantizer.scale, groups)
    rounded = codes(emit, step.divide(emit, x, name, RANK), name, step.reference, site.quantizer.bits)
    ratios = (step.ratio(emit, name, RANK),) if step.grouped else ()
    return _Operand(rounded, float(step.reference), ratios)


def _scores_of(probabilities: ir.Value, name: str) -> tuple[ir.Value, ir.Value, float, str]:
    """(q, k, factor, name of the scores' module) of probabilities = Softmax(factor q kᵀ)."""
    softmax = probabilities.producer()
    scaled = softmax.inputs[0] if softmax is not None else None
    scaling = scaled.producer() if scaled is not None else None
    matmul = scaling.inputs[0].producer() if scaling is not None and scaling.inputs[0] is not None else None
    transpose = matmul.inputs[1].producer() if matmul is not None and matmul.inputs[1] is not None else None
    chain = [None if node is None else node.op_type for node in (softmax, scaling, matmul, transpose)]
    if chain != ["Softmax", "Mul", "MatMul", "Transpose"]:
        raise UsageError(f"the trace of '{name}' multiplies {chain}, expected a Softmax of scaled scores. "
                         "Export with --attention simulated.")  # fmt: skip
    assert scaling is not None
    assert matmul is not None
    assert transpose is not None
    q, k, constant = matmul.inputs[0], transpose.inputs[0], scaling.inputs[1]
    assert q is not None
    assert k is not None
    assert constant is not None
    assert constant.const_value is not None
    assert tuple(transpose.attributes["perm"].as_ints()) == TRANSPOSED
    return q, k, float(constant.const_value.numpy()), scope_of(matmul)
