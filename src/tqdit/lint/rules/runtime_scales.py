"""Scales that are known only while the graph runs.

1. The scale of a QuantizeLinear or DequantizeLinear is not a constant: neither an initializer that nobody can override,
   nor a Constant, nor computed from such. Every backend builds it, and TensorRT and OpenVINO then run the product in
   float; ONNX Runtime keeps INT8 for one scale a tensor and loses it for one a row.
"""

from __future__ import annotations

from collections.abc import Iterator

from tqdit.lint.finding import Finding
from tqdit.lint.program import Program

RATIO_FORM = "x / r[g] -> QuantizeLinear/DequantizeLinear with a constant scale -> MatMul -> * r[g]"


def check(program: Program) -> Iterator[Finding]:
    for site in program.standard_sites("QuantizeLinear", "DequantizeLinear"):
        if site.given(1) and not site.value(1).constant:
            yield Finding(
                "runtime-scale",
                "error",
                site.label,
                f"its scale '{site.node.input[1]}' is computed at run time. Every backend builds this without a word; "
                "TensorRT and OpenVINO then run the product in float, ONNX Runtime does unless there is one scale for "
                "the whole tensor.",
                f"Make the scale a constant; where it changes with the timestep use the ratio form: {RATIO_FORM}.",
            )
