"""Attention as one op: scores, rounded softmax and value product become a MultiRegionAttention node."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tqdit.errors import UsageError
from tqdit.export.passes.emit import Emitter
from tqdit.export.passes.groups import RowGroups
from tqdit.export.passes.operands import GraphOperand, low_scales, replace
from tqdit.export.passes.scopes import scope_of
from tqdit.plugins.multi_region_attention.schema import OP_TYPE
from tqdit.quantization.quantizer import Float32, Part
from tqdit.quantization.table import ScaleTable, Site

RANK = 4  # of q, k and v
TRANSPOSED = (0, 1, 3, 2)
LARGEST_FLOAT16 = 65504


def fuse_attention(graph: ir.Graph, product: ir.Node, name: str, table: ScaleTable, groups: RowGroups) -> str:
    """Requires: `product` multiplies a Softmax of scaled scores with v, and stands in the module `name`; its left
    quantizer has `softmax_regions`.

    Ensures: in its place stands one MultiRegionAttention. Quantized q, k and v enter as their integer codes, which are
    exact in float16 and bfloat16 too: constant scales of q and k are part of its scale, those of v multiply its result,
    and scales that follow the timestep multiply the codes of q. Returns the name of the scores' module, whose sites are
    used here.
    """
    probabilities, v = product.inputs
    assert probabilities is not None
    assert v is not None
    softmax = table.by_module[name]["left"].quantizer
    low, high = (softmax.constants()[scale] for scale in softmax.softmax_regions() or ())
    _check_range(low, high, softmax.bits, name)
    q, k, factor, scores = _scores_of(probabilities, name)
    emit = Emitter(graph, product, name)
    left, right = (_codes(emit, value, table.by_module.get(scores, {}).get(role), role, groups)
                   for value, role in ((q, "left"), (k, "right")))  # fmt: skip
    q = left.values
    for ratio in (left.ratio, right.ratio):
        q = q if ratio is None else emit.op("Mul", q, ratio)
    value = _codes(emit, v, table.by_module[name]["right"], "value", groups)
    y = emit.custom(OP_TYPE, q, right.values, value.values, low_scales(emit, low, groups), bits=softmax.bits,
                    high_step=float(high), scale=left.unit * right.unit * factor)  # fmt: skip
    y = emit.op("Mul", y, emit.constant("value.scale", np.float32(value.unit)))
    if value.ratio is not None:
        y = emit.op("Mul", y, value.ratio)
    replace(graph, product, y)
    return scores


def _check_range(low: Float32, high: Float32, bits: int, name: str) -> None:
    """Kernels keep probabilities in units of the low scale; the largest must fit float16."""
    ratio = float(high) / float(low.min())
    top = (1 << (bits - 1)) - 1
    if top * ratio > LARGEST_FLOAT16:
        raise UsageError(
            f"'{name}' has a low scale {ratio:.0f} times finer than its high scale; --attention fused takes up to "
            f"{LARGEST_FLOAT16 / top:.0f} times. Export with --attention simulated."
        )


def _codes(emit: Emitter, x: ir.Value, site: Site | None, name: str, groups: RowGroups) -> Part[ir.Value]:
    """The one part of a tensor, as integer codes. A tensor without a site is its own code."""
    if site is None:
        return Part(x)
    (part,) = GraphOperand(emit, site.quantizer, name, RANK, groups, "codes").parts(x)
    return part


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
