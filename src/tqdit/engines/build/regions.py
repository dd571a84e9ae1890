"""Two regions of a softmax as a sum of two codes, for backends that multiply uint8 by int8.

In the file integer products of a softmax in two regions start from rounded probabilities, chosen by region, since that
is right everywhere. With q = 2^(bits-1), s2 = s1 2^i and i < bits, P = q s1 lies on both grids, and the value is also

    p^ = s1 round(min(p, P) / s1) + s2 max(round((p - P) / s2), 0),

of which the first codes are 0..q and the second 0..q - 1. Both come from the softmax directly: no op of ours, no
comparison, no choice. Values differ by float rounding alone.

Where the backend computes one operation after the other, each pass over the floats counts. The first codes then
have the zero point 255 - q, for which uint8 saturates at q. P / s2 = q / 2^i is an integer. If all groups of
timesteps have the same P, the second codes are max(round(p / s2), P / s2) with the zero point P / s2: the maximum is
one of bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from tqdit.plugins.multi_region_numerator.schema import OP_TYPE as NUMERATOR
from tqdit.plugins.multi_region_softmax.schema import OP_TYPE as SOFTMAX
from tqdit.plugins.time_group_select.schema import OP_TYPE as SELECT

BOUNDARY, JOINT = ".left.boundary", ".left.joint"  # in names: (q - 1/2) s1, and P
LAST_AXIS, UINT8_ZERO = "tqdit.last_axis", "tqdit.uint8.0"

_Replaced = dict[int, list[onnx.NodeProto]]  # what stands in the place of a node, by its id


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

    chains: the backend computes operations in one pass over memory if each has one reader. Codes are then uint8, and
    numerators are divided once for each of their codes, from which no numerator is stored.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    replaced: _Replaced = {}
    added: dict[str, NDArray[Any]] = {LAST_AXIS: np.array([-1]), UINT8_ZERO: np.array(0, np.uint8)}
    retyped: set[str] = set()
    ones = _ones(graph, constants)
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
        if chains:
            made = _chained(split)
        else:
            joints = np.unique(np.round(numpy_helper.to_array(constants[maker.input[place]]) / high_scale))
            made = _saturating(split, bits, int(joints[0]) if joints.size == 1 else None, ones, added)
        for old in (split.softmax, split.compare, *split.low, *split.high):
            for new in made.get(id(old), []):
                if not new.metadata_props:
                    new.metadata_props.extend(old.metadata_props)
        replaced |= made
        retyped |= {name for branch in (split.low, split.high) for name in branch[-2].output}
    if not replaced:
        return
    nodes = [new for node in graph.node for new in replaced.get(id(node), [node])]
    del graph.node[:]
    graph.node.extend(nodes)
    known = [info for info in graph.value_info if info.name not in retyped]
    del graph.value_info[:]
    graph.value_info.extend(known)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in added.items())


def _ones(graph: onnx.GraphProto, constants: dict[str, onnx.TensorProto]) -> set[str]:
    """Ratios of the groups' scales that are 1 in every group."""
    selections = [node for node in graph.node if node.op_type == SELECT]
    return {node.output[0] for node in selections if np.all(numpy_helper.to_array(constants[node.input[2]]) == 1)}


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


def _chained(split: _Split) -> _Replaced:
    """uint8 codes, and no value but the softmax that two nodes read."""
    softmax, p, joint = split.softmax, split.softmax.output[0], split.compare.input[1]
    replaced, largest = _softmax(split)
    if largest:
        reciprocal = f"{largest}.reciprocal"
        replaced[id(softmax)].append(_node("Reciprocal", [largest], reciprocal, f"{softmax.name}.reciprocal"))
        replaced[id(split.compare)] = [_node("Mul", [joint, largest], f"{p}.joint", f"{softmax.name}.joint")]
        joint = f"{p}.joint"
    for op_type, branch in (("Min", split.low), ("Sub", split.high)):
        choice = branch[0]
        part = _node(op_type, [p, joint], choice.output[0], f"{choice.name}.{op_type}")
        replaced[id(choice)] = [part]
        if largest:
            part.output[0] = f"{choice.output[0]}.p"
            replaced[id(choice)].append(
                _node("Mul", [part.output[0], reciprocal], choice.output[0], f"{choice.name}.numerators")
            )
        replaced |= _rounded(branch, choice.output[0], UINT8_ZERO)
    return replaced


def _saturating(
    split: _Split, bits: int, joint_code: int | None, ones: set[str], added: dict[str, NDArray[Any]]
) -> _Replaced:
    """As few passes over floats as possible.

    joint_code: P / s2, if it is that of all groups of timesteps. ones: values that are always 1. added: gets the
    constants.
    """
    softmax, values, joint = split.softmax, split.softmax.output[0], split.compare.input[1]
    replaced, largest = _softmax(split)
    if largest:
        numerators = f"{values}.numerators"
        replaced[id(softmax)].append(_node("Div", [values, largest], numerators, f"{softmax.name}.numerators"))
        values = numerators
    codes = 1 << (bits - 1)
    replaced |= {id(split.low[0]): []} | _rounded(split.low, values, _offset(255 - codes, added), ones)
    choice, quantize, dequantize = split.high[0], *split.high[-2:]
    if joint_code is None:
        replaced[id(choice)] = [_node("Sub", [values, joint], choice.output[0], f"{choice.name}.Sub")]
        return replaced | _rounded(split.high, choice.output[0], UINT8_ZERO)
    least = _offset(min(joint_code, codes - 1), added)  # if no p has a code above P's, all second codes are 0
    replaced |= {id(choice): []} | _rounded(split.high, values, least)
    quantize.input[2] = UINT8_ZERO
    clip = _node("Max", [quantize.output[0], least], f"{quantize.output[0]}.high", f"{quantize.name}.Max")
    dequantize.input[0] = clip.output[0]
    replaced[id(quantize)] = [quantize, clip]
    return replaced


def _softmax(split: _Split) -> tuple[_Replaced, str | None]:
    """A softmax for that of two regions, and no comparison. Of numerators e = p / max p also 1 / sum(e) = max p."""
    softmax = split.softmax
    made = [_node("Softmax", softmax.input[:1], softmax.output[0], softmax.name, axis=-1)]
    largest = softmax.output[1] if softmax.op_type == NUMERATOR else None
    if largest:
        made.append(_node("ReduceMax", [softmax.output[0], LAST_AXIS], largest, f"{softmax.name}.largest"))
    return {id(softmax): made, id(split.compare): []}, largest


def _rounded(branch: list[onnx.NodeProto], value: str, offset: str, ones: Collection[str] = ()) -> _Replaced:
    """Let a branch round `value` with a zero point, without divisions by `ones`, and without a Clip to fewer bits,
    which have no code q.
    """
    removed: _Replaced = {}
    for node in branch[1:]:
        if node.op_type == "Clip" or (node.op_type == "Div" and node.input[1] in ones):
            removed[id(node)] = []
            continue
        node.input[0], value = value, node.output[0]
    for node in branch[-2:]:
        node.input[2] = offset
    return removed


def _offset(code: int, added: dict[str, NDArray[Any]]) -> str:
    """The name of a constant."""
    name = f"tqdit.uint8.{code}"
    added[name] = np.array(code, np.uint8)
    return name


def _node(op_type: str, inputs: Sequence[str], output: str, name: str, **attributes: int) -> onnx.NodeProto:
    return onnx.helper.make_node(op_type, inputs, [output], name=name, **attributes)  # type: ignore[arg-type]
