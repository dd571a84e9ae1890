"""Two regions of a softmax as a sum of two codes, for backends that multiply uint8 by int8.

In the file integer products of a softmax in two regions start from rounded probabilities, chosen by region, since that
is right everywhere. With q = 2^(bits-1), s2 = s1 2^i and i < bits, P = q s1 lies on both grids, and the value is also

    p^ = s1 round(min(p, P) / s1) + s2 max(round((p - P) / s2), 0),

of which the first codes are 0..q and the second 0..q - 1, as uint8 saturates by itself. Both come from the softmax
directly: no op of ours, no comparison, no choice. Values differ by float rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from tqdit.plugins.multi_region_numerator.schema import OP_TYPE as NUMERATOR
from tqdit.plugins.multi_region_softmax.schema import OP_TYPE as SOFTMAX

BOUNDARY, JOINT = ".left.boundary", ".left.joint"  # in names: (q - 1/2) s1, and P
LAST_AXIS, NO_OFFSET = "tqdit.last_axis", "tqdit.no_offset.uint8"


@dataclass(frozen=True)
class _Split:
    """The nodes of one product. low, high: from the choice to the DequantizeLinear."""

    softmax: onnx.NodeProto
    compare: onnx.NodeProto
    low: list[onnx.NodeProto]
    high: list[onnx.NodeProto]


def has_regions(model: onnx.ModelProto) -> bool:
    """Whether `sum_regions` could find anything."""
    compared = {node.input[0] for node in model.graph.node if node.op_type == "LessOrEqual"}
    return any(node.op_type in (SOFTMAX, NUMERATOR) and node.output[0] in compared for node in model.graph.node)


def sum_regions(model: onnx.ModelProto, chains: bool = False) -> None:
    """Rewrite the integer products of softmaxes in two regions, in place; those of other scales stay as they are.

    chains: the backend computes operations in one pass over memory if each has one reader. Numerators are then divided
    once for each of their codes, from which no numerator is stored.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    replaced: dict[int, list[onnx.NodeProto]] = {}
    retyped: set[str] = set()
    for split in _splits(graph):
        facts = {entry.name: entry for entry in split.softmax.attribute}
        bits, high_scale = facts["bits"].i, np.float32(facts["high_scale"].f)
        maker = makers.get(split.compare.input[1], split.compare)  # of groups of timesteps the node that selects one's
        (place,) = (index for index, name in enumerate(maker.input) if BOUNDARY in name or JOINT in name)
        table = maker.input[place]
        if BOUNDARY in table:  # else another call of the module has changed it
            joint = _joint(numpy_helper.to_array(constants[table]), bits, high_scale)
            if joint is None:
                continue
            maker.input[place] = name = table.replace(BOUNDARY, JOINT)
            if name not in constants:
                constants[name] = numpy_helper.from_array(joint, name)
                graph.initializer.append(constants[name])
        replaced |= _write(split, chains)
        retyped |= {name for branch in (split.low, split.high) for name in branch[-2].output}
    if not replaced:
        return
    nodes = [new for node in graph.node for new in replaced.get(id(node), [node])]
    del graph.node[:]
    graph.node.extend(nodes)
    known = [info for info in graph.value_info if info.name not in retyped]
    del graph.value_info[:]
    graph.value_info.extend(known)
    graph.initializer.append(numpy_helper.from_array(np.array([-1]), LAST_AXIS))
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.uint8), NO_OFFSET))


def _splits(graph: onnx.GraphProto) -> Iterator[_Split]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in graph.node:
        if node.op_type not in (SOFTMAX, NUMERATOR):
            continue
        users = readers.get(node.output[0], [])
        if sorted(user.op_type for user in users) != ["LessOrEqual", "Where", "Where"]:
            continue
        (compare,) = (user for user in users if user.op_type == "LessOrEqual")
        choices = (user for user in users if user.op_type == "Where")
        low, high = sorted(choices, key=lambda one: one.input[2] == node.output[0])
        yield _Split(node, compare, *(_branch(start, readers) for start in (low, high)))


def _branch(start: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]]) -> list[onnx.NodeProto]:
    """The nodes from a choice to its DequantizeLinear, each the only reader of the one before."""
    nodes = [start]
    while nodes[-1].op_type != "DequantizeLinear":
        (reader,) = readers[nodes[-1].output[0]]
        nodes.append(reader)
    return nodes


def _joint(boundary: NDArray[np.float32], bits: int, high_scale: np.float32) -> NDArray[np.float32] | None:
    """P of boundaries (q - 1/2) s1; None if s1 is not s2 / 2^i, 0 <= i < bits, or if 1 is above the top code."""
    codes = 1 << (bits - 1)
    ratio = np.log2(high_scale * (codes - 0.5) / boundary.astype(np.float64))
    power = np.round(ratio)
    if np.abs(ratio - power).max() > 1e-4 or power.min() < 0 or power.max() >= bits or high_scale * (codes - 0.5) < 1:
        return None
    return (codes * high_scale * np.exp2(-power)).astype(np.float32)


def _write(split: _Split, chains: bool) -> dict[int, list[onnx.NodeProto]]:
    """What stands in the place of each node of a split."""
    softmax, values, joint = split.softmax, split.softmax.output[0], split.compare.input[1]
    made = [onnx.helper.make_node("Softmax", softmax.input[:1], [values], name=softmax.name, axis=-1)]
    are_numerators, compared = softmax.op_type == NUMERATOR, list[onnx.NodeProto]()
    if are_numerators:  # e = p / max p, and 1 / sum(e) = max p
        largest = softmax.output[1]
        made.append(_node("ReduceMax", [values, LAST_AXIS], largest, f"{softmax.name}.largest"))
        if chains:
            made.append(_node("Reciprocal", [largest], f"{largest}.reciprocal", f"{softmax.name}.reciprocal"))
            compared = [_node("Mul", [joint, largest], f"{values}.joint", f"{softmax.name}.joint")]
            joint = f"{values}.joint"
        else:
            made.append(_node("Div", [values, largest], f"{values}.numerators", f"{softmax.name}.numerators"))
            values = f"{values}.numerators"
    replaced = {id(softmax): made, id(split.compare): compared}
    for op_type, branch in (("Min", split.low), ("Sub", split.high)):
        chosen = branch[0]
        (result,) = chosen.output
        nodes = [_node(op_type, [values, joint], result, f"{chosen.name}.{op_type}")]
        if are_numerators and chains:
            nodes[0].output[0] = f"{result}.p"
            nodes.append(_node("Mul", [f"{result}.p", f"{largest}.reciprocal"], result, f"{chosen.name}.numerators"))
        replaced[id(chosen)] = nodes
        for before, node in pairwise(branch):
            if node.op_type == "Clip":  # to int8 of fewer bits, which has no code q
                replaced[id(node)] = []
                (reader,) = (one for one in branch if node.output[0] in one.input)
                reader.input[0] = before.output[0]
        for node in branch[-2:]:
            node.input[2] = NO_OFFSET
    for old in (softmax, split.compare, split.low[0], split.high[0]):
        for new in replaced[id(old)]:
            new.metadata_props.extend(old.metadata_props)
    return replaced


def _node(op_type: str, inputs: list[str], output: str, name: str) -> onnx.NodeProto:
    return onnx.helper.make_node(op_type, inputs, [output], name=name)
