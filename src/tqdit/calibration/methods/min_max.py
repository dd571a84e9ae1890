"""The baseline: every scale from the range of its tensor."""

from __future__ import annotations

from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.problem import Problem, Solution


def solve(problem: Problem, config: QuantizationConfig) -> Solution:
    parameters = problem.initial
    return Solution(parameters, (problem.objective(parameters),), problem.multiply_adds)
