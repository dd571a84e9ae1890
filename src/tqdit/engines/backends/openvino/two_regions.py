"""Rounding in two regions as one chain of elementwise operations: OpenVINO computes a chain in one pass over memory."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What the body computes from `bits`.
NUMBERS: dict[str, Callable[..., float]] = {"Convert": float, "Power": pow, "Subtract": operator.sub}
SELECTION = {"Gather", "Reshape", "Squeeze", "Unsqueeze"}  # between a table of scales and the scale of a row


def chain_two_regions(ov: ModuleType, model: Any) -> None:
    """Replace p, compared with a boundary and divided by the scale of its region, by a chain without a second reader.

    With c = (q - 1) + 1 codes below the coarse region, P = c s1 is a value of both grids, since s2 is s1 times a power
    of two of at most c. Seen from P both regions are grids through zero:
        quantized = P + s2 narrow(round(widen(p - P) / s2)), widen(x) = x s2 / s1 and narrow(x) = x s1 / s2 if x < 0.
    Values are those of MultiRegionSoftmax up to float rounding, for which p - P counts: an error of 1e-5 codes. A graph
    whose scales are no such powers stays as it is.
    """
    op = ov.opset8
    for node in model.get_ordered_ops():
        found = _match(node)
        if found is None:
            continue
        p, low_scale, high_scale, top, quantized = found
        codes = float(top) + 1
        if not _on_both_grids(low_scale, high_scale, codes):
            continue
        coarse = op.constant(np.float32(high_scale))
        joint = op.multiply(low_scale, op.constant(np.float32(codes)))
        widened = op.prelu(op.subtract(p, joint), op.divide(coarse, low_scale))
        code = op.round(op.divide(widened, coarse), "half_to_even")
        narrowed = op.multiply(op.prelu(code, op.divide(low_scale, coarse)), coarse)
        chained = op.add(narrowed, joint)
        chained.set_friendly_name(quantized.get_friendly_name())
        quantized.output(0).replace(chained.output(0))


def _match(node: Any) -> tuple[Any, Any, float, float, Any] | None:
    """p, low scale, high scale, top code and the last node of MultiRegionSoftmax's rounding that divides in `node`."""
    if node.get_type_name() != "Divide" or _maker(node, 1).get_type_name() != "Maximum":
        return None
    own = _maker(node, 1)
    high, rounded = _maker(own, 0), _reader(node)
    code = None if rounded is None else _reader(rounded)
    quantized = None if code is None else _reader(code)
    if rounded is None or code is None or quantized is None or high.get_type_name() != "Multiply":
        return None
    kinds = [each.get_type_name() for each in (_maker(high, 0), rounded, code, quantized)]
    if kinds != ["Convert", "Round", "Minimum", "Multiply"] or _maker(quantized, 1) != own:
        return None
    scale, top = _number(_maker(high, 1)), _number(_maker(code, 1))
    return None if scale is None or top is None else (node.input_value(0), own.input_value(1), scale, top, quantized)


def _on_both_grids(low_scale: Any, high_scale: float, codes: float) -> bool:
    """Whether every low scale is the high one over 1, 2, 4 .. `codes`, and no probability is above the top code."""
    table = _table(low_scale)
    if table is None or high_scale * (codes - 0.5) < 1:
        return False
    return bool(np.isin(np.float32(high_scale) / table, 2.0 ** np.arange(np.log2(codes) + 1)).all())


def _table(scale: Any) -> NDArray[np.float32] | None:
    """The constants that a scale is selected from."""
    node = scale.get_node()
    while node.get_type_name() in SELECTION:
        node = node.input_value(0).get_node()
    return node.data if node.get_type_name() == "Constant" else None


def _number(node: Any) -> float | None:
    """A constant, or what the body computes from constants."""
    if node.get_type_name() == "Constant":
        return float(node.data.item()) if node.data.size == 1 else None
    compute = NUMBERS.get(node.get_type_name())
    inputs = [_number(_maker(node, index)) for index in range(len(node.inputs()))]
    return None if compute is None or None in inputs else compute(*inputs)


def _maker(node: Any, index: int) -> Any:
    return node.input_value(index).get_node()


def _reader(node: Any) -> Any | None:
    """The only one that reads a node."""
    readers = node.output(0).get_target_inputs()
    return next(iter(readers)).get_node() if len(readers) == 1 else None
