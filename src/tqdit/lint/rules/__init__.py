"""The rules, in the order in which their findings are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tqdit.lint.finding import Finding
from tqdit.lint.program import Program
from tqdit.lint.rules import (
    float_twins,
    functions,
    operators,
    opsets,
    runtime_scales,
    scale_axes,
    scale_types,
    scale_values,
    zero_points,
)

RULES: tuple[Callable[[Program], Iterator[Finding]], ...] = (
    runtime_scales.check,
    zero_points.check,
    scale_values.check,
    scale_types.check,
    scale_axes.check,
    functions.check,
    float_twins.check,
    operators.check,
    opsets.check,
)
