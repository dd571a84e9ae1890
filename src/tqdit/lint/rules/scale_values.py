"""Numbers that no scale can be.

1. NaN or infinite.
2. Zero or negative.
3. Denormal in its own type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tqdit.lint.finding import Finding, Rule
from tqdit.lint.program import Program

RULE = Rule("scale-value")
SMALLEST_NORMAL: dict[ir.DataType, float] = {
    ir.DataType.FLOAT: 2.0**-126,
    ir.DataType.BFLOAT16: 2.0**-126,
    ir.DataType.FLOAT16: 2.0**-14,
    ir.DataType.DOUBLE: 2.0**-1022,
}


def check(program: Program) -> Iterator[Finding]:
    for node in program.standard_nodes("QuantizeLinear", "DequantizeLinear"):
        scale = node.value(1)
        if scale.array is None or scale.dtype not in SMALLEST_NORMAL:
            continue
        with np.errstate(invalid="ignore"):  # a NaN is what this looks for
            numbers = scale.array.astype(np.float64)
        wrong = _wrong(numbers, scale.dtype)
        if wrong is not None:
            what, consequence = wrong
            yield RULE.error(
                node.label,
                f"its scale '{node.input_names[1]}' {what}. {consequence}",
                "Calibrate again; for a tensor that is all zero take any normal scale, such as 1. A float16 scale that "
                "is too small for its type belongs in float32.",
            )


def _wrong(scale: NDArray[Any], dtype: ir.DataType) -> tuple[str, str] | None:
    """What is wrong with a scale, and what comes of it."""
    smallest = SMALLEST_NORMAL[dtype]
    cases = (
        (~np.isfinite(scale), "is not finite", "Every result becomes NaN, zero or infinite."),
        (scale == 0, "is zero", "x / 0 saturates every code and every result is 0 or NaN; TensorRT refuses the file."),
        (scale < 0, "is negative", "TensorRT refuses the file, and calibration never gives this."),
        (
            scale < smallest,
            f"is denormal in {dtype.name.lower()}",
            "It has lost bits, and is zero wherever denormals are flushed, as on GPUs.",
        ),
    )
    for mask, what, consequence in cases:
        if mask.any():
            index = int(np.flatnonzero(mask)[0])
            where = f" at index {index}" if scale.size > 1 else ""
            return f"{what}{where} ({scale.flat[index]:g})", consequence
    return None
