"""Element types by the operators' own signatures: enough to compare a scale's type with its input's.

onnx's shape inference would do as well, but copies the whole model with its weights.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import onnx
from onnx import TensorProto

from tqdit.lint.values import Value

STANDARD = ("", "ai.onnx")
_KINDS: dict[str, int] = dict(TensorProto.DataType.items())


def output_type(op_type: str, opset: int, inputs: Sequence[Value], index: int) -> int:
    """Element type of a standard operator's output, 0 where its signature leaves it open."""
    signature = _signature(op_type, opset)
    if signature is None or not signature[1]:
        return TensorProto.UNDEFINED
    formal_inputs, outputs = signature
    wanted = outputs[min(index, len(outputs) - 1)]
    if wanted.startswith("tensor("):
        return _concrete(wanted)
    for position, value in enumerate(inputs):
        if formal_inputs and formal_inputs[min(position, len(formal_inputs) - 1)] == wanted and value.dtype:
            return value.dtype
    return TensorProto.UNDEFINED


def _concrete(name: str) -> int:
    return _KINDS.get(name.removeprefix("tensor(").removesuffix(")").upper(), TensorProto.UNDEFINED)


@functools.lru_cache(maxsize=4096)
def _signature(op_type: str, opset: int) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Type strings of the formal inputs and outputs; the last one repeats where an operator takes any number."""
    if not onnx.defs.has(op_type, opset, ""):
        return None
    schema = onnx.defs.get_schema(op_type, opset, "")
    return tuple(i.type_str for i in schema.inputs), tuple(o.type_str for o in schema.outputs)
