"""Attention as one op: scores, rounded softmax and value product become a node such as MultiRegionAttention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tqdit.errors import UsageError
from tqdit.exporter.passes.emit import Emitter
from tqdit.exporter.passes.groups import GroupSelector
from tqdit.exporter.passes.operands import GraphOperand, low_scales, rank_of, replace
from tqdit.exporter.passes.scopes import scope_of
from tqdit.quantization.quantizer import Float32, Part
from tqdit.quantization.table import ScaleTable, Site

RANK = 4  # of q, k and v
TRANSPOSED = (0, 1, 3, 2)
LARGEST_FLOAT16 = 65504


def fuse_attention(graph: ir.Graph, product: ir.Node, name: str, table: ScaleTable, groups: GroupSelector) -> str:
    """Requires: `product` multiplies a Softmax of scaled scores with v, and stands in the module `name`; its left
    quantizer has custom ops for a `softmax`. Scores may be masked by an Add or a Where.

    Ensures: in its place stands one node of its attention op. Quantized q, k and v enter as their integer codes, which
    are exact in float16 and bfloat16 too: constant scales of q and k are part of its scale, those of v multiply its
    result, and scales that follow the timestep multiply the codes of q. Returns the name of the scores' module, whose
    sites are used here.
    """
    probabilities, v = product.inputs
    assert probabilities is not None
    assert v is not None
    softmax = table.by_module[name]["left"].quantizer
    assert softmax.softmax is not None
    low, high = (softmax.constants()[scale] for scale in (softmax.softmax.low, softmax.softmax.high))
    _check_range(low, high, softmax.bits, name)
    emit = Emitter(graph, product, name)
    scores = f"{name.rpartition('.')[0]}.scores"
    made = _scores_of(emit, probabilities, name, scores)
    left, right = (_codes(emit, value, table.by_module.get(scores, {}).get(role), role, groups)
                   for value, role in ((made.q, "left"), (made.k, "right")))  # fmt: skip
    q = left.values
    for ratio in (left.ratio, right.ratio):
        q = q if ratio is None else emit.op("Mul", q, ratio)
    value = _codes(emit, v, table.by_module[name]["right"], "value", groups)
    (y,) = emit.custom(
        softmax.softmax.attention, q, right.values, value.values, made.mask, low_scales(emit, low, groups),
        bits=softmax.bits, high_step=float(high), scale=left.unit * right.unit * made.factor,
    )  # fmt: skip
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


def _codes(emit: Emitter, x: ir.Value, site: Site | None, name: str, groups: GroupSelector) -> Part[ir.Value]:
    """The one part of a tensor, as integer codes. A tensor without a site is its own code."""
    if site is None:
        return Part(x)
    (part,) = GraphOperand(emit, site.quantizer, name, RANK, groups, "codes").parts(x)
    return part


@dataclass(frozen=True)
class _Scores:
    """factor q kᵀ + mask, as a Softmax gets it."""

    q: ir.Value
    k: ir.Value
    factor: float
    mask: ir.Value


def _scores_of(emit: Emitter, probabilities: ir.Value, name: str, scores: str) -> _Scores:
    """What makes probabilities = Softmax(factor q kᵀ + mask); `scores` is the module of the first product."""
    softmax = probabilities.producer()
    found = [None if softmax is None else softmax.op_type]
    node, factor = _maker_of(softmax, 0), 1.0
    mask = emit.constant("no_mask", np.zeros((1,) * RANK, np.float32))
    if node is not None and node.op_type in ("Add", "Where") and scope_of(node) != scores:
        makers = [None if value is None else value.producer() for value in node.inputs]
        (place,) = (index for index, made in enumerate(makers) if made is not None and scope_of(made) == scores)
        mask, node = _mask(emit, node, place), _maker_of(node, place)
    while node is not None and node.op_type == "Mul" and (constant := node.inputs[1]) is not None:
        if constant.const_value is None or constant.const_value.size != 1:
            break
        factor *= float(constant.const_value.numpy().item())
        found.append("Mul")
        node = _maker_of(node, 0)
    found.append(None if node is None else node.op_type)
    if found[0] != "Softmax" or node is None or node.op_type != "MatMul" or rank_of(probabilities) != RANK:
        raise UsageError(
            f"the trace of '{name}' multiplies {found} of {rank_of(probabilities)} dimensions, expected a Softmax of "
            f"scaled scores of {RANK} dimensions. Export with --attention simulated."
        )
    q, transposed = node.inputs
    assert q is not None
    assert transposed is not None
    return _Scores(q, _transpose(emit, transposed), factor, mask)


def _mask(emit: Emitter, node: ir.Node, place: int) -> ir.Value:
    """What a node adds to its input `place`, with four dimensions; a Where adds what it puts in the place of scores."""
    others = [value for index, value in enumerate(node.inputs) if index != place and value is not None]
    rank = max(rank_of(value) for value in others)
    mask = others[0]
    if node.op_type == "Where":
        zero = emit.constant("unmasked", np.float32(0))
        others.insert(place, zero)
        mask = emit.op("Where", *others)
    if rank == RANK:
        return mask
    return emit.op("Unsqueeze", mask, emit.constant("mask.axes", np.arange(RANK - rank)))


def _maker_of(node: ir.Node | None, index: int) -> ir.Node | None:
    value = None if node is None else node.inputs[index]
    return None if value is None else value.producer()


def _transpose(emit: Emitter, transposed: ir.Value) -> ir.Value:
    """k of kᵀ. The exporter may have merged other transposes into the one of the scores; they become one here too."""
    node = transposed.producer()
    order: tuple[int, ...] = TRANSPOSED
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        merged = tuple(node.attributes["perm"].as_ints())
        transposed, order = node.inputs[0], tuple(merged[axis] for axis in TRANSPOSED)
    return transposed if order == tuple(range(RANK)) else emit.op("Transpose", transposed, perm=order)
