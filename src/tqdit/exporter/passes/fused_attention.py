"""Attention as one op: scores, rounded softmax and value product become a node such as MultiRegionAttention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tqdit.errors import UsageError
from tqdit.exporter.passes.emit import Emitter
from tqdit.exporter.passes.groups import GroupSelector
from tqdit.exporter.passes.operands import GraphOperand, by_image, rank_of, replace
from tqdit.exporter.passes.scopes import scope_of
from tqdit.exporter.passes.skipped_quantizer import following_quantizer
from tqdit.quantization.quantizer import Float32, Part, Quantizer, RegionOps, Rounding
from tqdit.quantization.table import ScaleTable, Site

RANK = 4  # of q, k and v
TRANSPOSED = (0, 1, 3, 2)
LARGEST_FLOAT16 = 65504


def fuse_attention(graph: ir.Graph, product: ir.Node, name: str, table: ScaleTable, groups: GroupSelector) -> str:
    """Requires: `product` multiplies a Softmax of scaled scores with v, and stands in the module `name`; its left
    quantizer has custom ops for a `softmax`. Scores may be masked by an Add or a Where. Linear layers are quantized.

    Ensures: in its place stands one node of its attention op. If q, k and v are quantized it takes their codes as int8,
    and all scales as inputs; its result is int8 as well if nothing but a transpose and a reshape stands before the
    quantizer of a linear layer, which goes. If q or k is not quantized it takes floats. Returns the name of the scores'
    module, whose sites are used here.
    """
    probabilities, v = product.inputs
    assert probabilities is not None
    assert v is not None
    emit = Emitter(graph, product, name)
    scores = f"{name.rpartition('.')[0]}.scores"
    made = _scores_of(emit, probabilities, name, scores)
    sites = _Sites(table.by_module[name]["left"].quantizer, table.by_module[name]["right"],
                   *(table.by_module.get(scores, {}).get(role) for role in ("left", "right")))  # fmt: skip
    if sites.q is None or sites.k is None:
        replace(graph, product, _float_attention(emit, made, v, sites, name, groups))
    else:
        _integer_attention(emit, product, made, v, sites, groups)
    return scores


@dataclass(frozen=True)
class _Sites:
    """What is known of the operands; q or k may be float."""

    softmax: Quantizer
    v: Site
    q: Site | None
    k: Site | None

    @property
    def ops(self) -> RegionOps:
        assert self.softmax.softmax is not None
        return self.softmax.softmax

    @property
    def scales(self) -> tuple[Float32, Float32]:
        """(low, high), () or (G,), and ()."""
        low, high = (self.softmax.constants()[scale] for scale in (self.ops.low, self.ops.high))
        return low, high


def _integer_attention(
    emit: Emitter, product: ir.Node, made: _Scores, v: ir.Value, sites: _Sites, groups: GroupSelector
) -> None:
    """Codes that are int8, in the place of the product."""
    assert sites.q is not None
    assert sites.k is not None
    q, k, columns = (
        _codes(emit, value, site, role, groups, "int8").values
        for value, site, role in ((made.q, sites.q, "left"), (made.k, sites.k, "right"),
                                  (_transpose(emit, v), sites.v, "value"))
    )  # fmt: skip
    q_scale, k_scale, v_scale = (site.quantizer.constants()["scale"] for site in (sites.q, sites.k, sites.v))
    low, high = sites.scales
    following = following_quantizer(product.outputs[0])
    out_type, out_scale, out_shift = ir.DataType.FLOAT, v_scale, np.zeros((), np.float32)
    if following is not None:
        out_type = ir.DataType.INT8
        out_scale, out_shift = v_scale / following.scale, -following.offset / following.scale
    numbers = {"scale": q_scale * k_scale * np.float32(made.factor), "low_scale": low, "out_scale": out_scale,
               "out_shift": out_shift}  # fmt: skip
    (y,) = emit.custom(
        sites.ops.integer_attention, q, k, columns, made.mask,
        *(by_image(emit, name, np.asarray(number, np.float32), groups) for name, number in numbers.items()),
        bits=sites.softmax.bits, high_scale=float(high), out_type=int(out_type),
    )  # fmt: skip
    replace(emit.graph, product, y)
    if following is not None:
        following.skip(y)


def _float_attention(
    emit: Emitter, made: _Scores, v: ir.Value, sites: _Sites, name: str, groups: GroupSelector
) -> ir.Value:
    """Codes that are floats, which are exact in float16 and bfloat16 too: constant scales of q and k are part of the
    node's scale, those of v multiply its result, and scales that follow the timestep multiply the codes of q."""
    low, high = sites.scales
    _check_range(low, high, sites.softmax.bits, name)
    left, right = (_codes(emit, value, site, role, groups, "codes")
                   for value, site, role in ((made.q, sites.q, "left"), (made.k, sites.k, "right")))  # fmt: skip
    q = left.values
    for ratio in (left.ratio, right.ratio):
        q = q if ratio is None else emit.op("Mul", q, ratio)
    value = _codes(emit, v, sites.v, "value", groups, "codes")
    (y,) = emit.custom(
        sites.ops.attention, q, right.values, value.values, made.mask, by_image(emit, "low_scale", low, groups),
        bits=sites.softmax.bits, high_scale=float(high), scale=left.unit * right.unit * made.factor,
    )  # fmt: skip
    y = emit.op("Mul", y, emit.constant("value.scale", np.float32(value.unit)))
    return y if value.ratio is None else emit.op("Mul", y, value.ratio)


def _check_range(low: Float32, high: Float32, bits: int, name: str) -> None:
    """Kernels keep probabilities in units of the low scale; the largest must fit float16."""
    ratio = float(high) / float(low.min())
    top = (1 << (bits - 1)) - 1
    if top * ratio > LARGEST_FLOAT16:
        raise UsageError(
            f"'{name}' has a low scale {ratio:.0f} times finer than its high scale; --attention fused takes up to "
            f"{LARGEST_FLOAT16 / top:.0f} times. Export with --attention simulated."
        )


def _codes(
    emit: Emitter, x: ir.Value, site: Site | None, name: str, groups: GroupSelector, rounding: Rounding
) -> Part[ir.Value]:
    """The one part of a tensor, as integer codes. A tensor without a site is its own code."""
    if site is None:
        return Part(x)
    (part,) = GraphOperand(emit, site.quantizer, name, RANK, groups, rounding).parts(x)
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
    """k of kᵀ, and vᵀ of v. Where the exporter merged other transposes into one, they become one here, too."""
    node = transposed.producer()
    order: tuple[int, ...] = TRANSPOSED
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        merged = tuple(node.attributes["perm"].as_ints())
        transposed, order = node.inputs[0], tuple(merged[axis] for axis in TRANSPOSED)
    return transposed if order == tuple(range(RANK)) else emit.op("Transpose", transposed, perm=order)
