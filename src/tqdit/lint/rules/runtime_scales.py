"""Scales that are known only while the graph runs.

1. The scale of a QuantizeLinear or DequantizeLinear is not a constant: neither an initializer that no input can
   override, nor a Constant, nor computed from such. Every backend builds it, and TensorRT and OpenVINO then run the
   product in float; ONNX Runtime keeps INT8 for one scale a tensor and loses it for one a row.
"""

from __future__ import annotations

from collections.abc import Iterator

from tqdit.lint.finding import Finding, Rule
from tqdit.lint.program import Program

RULE = Rule("runtime-scale")
RATIO_FORM = "x / r[g] -> QuantizeLinear/DequantizeLinear with a constant scale -> MatMul -> * r[g]"


def check(program: Program) -> Iterator[Finding]:
    for node in program.standard_nodes("QuantizeLinear", "DequantizeLinear"):
        if node.given(1) and not node.value(1).constant:
            yield RULE.error(
                node.label,
                f"its scale '{node.input_names[1]}' is computed at run time. Every backend builds this without an "
                "error; TensorRT and OpenVINO then run the product in float, ONNX Runtime does unless there is one "
                "scale for the whole tensor.",
                f"Make the scale a constant; if it changes with the timestep use the ratio form: {RATIO_FORM}.",
            )
