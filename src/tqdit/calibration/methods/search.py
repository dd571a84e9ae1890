"""Phase 3: alternating search (Algorithm 1, lines 14 to 33): W then X for linear layers, A then B for attention.

Every improvement tries candidates for one parameter while all others stay as they are and keeps the best of each
entry. The incumbent is among the candidates, so the objective never increases. Activations go from coarse to fine
candidates, weights are screened (screen.py); --coarse 1 tries every candidate of either.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.methods.screen import finalists
from tqdit.calibration.operands import Weight
from tqdit.calibration.problem import Problem, Solution
from tqdit.quantization.granularity import Role
from tqdit.quantization.quantizer import Parameters

Score = Callable[[Tensor], Tensor]  # one candidate per entry (E,) -> objective per entry (E,)


def solve(problem: Problem, config: QuantizationConfig) -> Solution:
    parameters = problem.initial
    history, multiply_adds = [problem.objective(parameters)], problem.multiply_adds
    for index in range(config.rounds):
        for role in problem.operands:
            for name in parameters[role]:
                parameters, objective, spent = improve(problem, parameters, role, name, config.coarse, index == 0)
                history.append(objective)
                multiply_adds += spent
    return Solution(parameters, tuple(history), multiply_adds)


def improve(
    problem: Problem, parameters: dict[Role, Parameters], role: Role, name: str, coarse: int, first: bool
) -> tuple[dict[Role, Parameters], float, int]:
    """One improvement: (new parameters, their objective, multiply-adds spent)."""
    operand = problem.operands[role]
    left, right = problem.sides(parameters)
    is_left = role in ("left", "input")

    def score(values: Tensor) -> Tensor:
        quantized = operand.quantize({**parameters[role], name: values})
        error = problem.error(quantized, right) if is_left else problem.error(left, quantized)
        return operand.entries(error)

    ladder = Ladder(operand.grid(name), parameters[role][name], score)
    screening = 0
    if coarse == 1 or len(ladder.grid) <= 2 * coarse:
        ladder.sweep(range(len(ladder.grid)))
    elif isinstance(operand, Weight):
        positions, screening = finalists(problem, operand, left, ladder.grid)
        for position in positions:
            ladder.try_positions(position)
    else:
        if first:
            ladder.sweep(range(coarse // 2, len(ladder.grid), coarse))
        stride = coarse // 2
        while stride:
            ladder.refine(stride)
            stride //= 2
    found: dict[Role, Parameters] = {**parameters, role: {**parameters[role], name: ladder.best}}
    spent = screening + ladder.evaluations * problem.multiply_adds
    return found, float(ladder.best_score.sum(dtype=torch.float64)), spent


class Ladder:
    """Candidates of E independent entries on a grid (n, E), tried in parallel; the incumbent (E,) is the first."""

    def __init__(self, grid: Tensor, incumbent: Tensor, score: Score) -> None:
        self.grid, self.score = grid, score
        self.best, self.best_score = incumbent, score(incumbent)
        self.position = (grid - incumbent).abs().argmin(0)  # (E,)
        self.evaluations = 1

    def sweep(self, positions: range) -> None:
        """Try the same grid positions for every entry."""
        for position in positions:
            self.try_positions(torch.full_like(self.position, position))

    def refine(self, stride: int) -> None:
        """Try each entry's neighbours at a distance of `stride`."""
        center = self.position
        for direction in (-stride, stride):
            self.try_positions((center + direction).clamp(0, len(self.grid) - 1))

    def try_positions(self, position: Tensor) -> None:
        """Try one grid position (E,) for each entry."""
        values = self.grid.gather(0, position[None])[0]
        score = self.score(values)
        better = score < self.best_score
        self.best = torch.where(better, values, self.best)
        self.best_score = torch.where(better, score, self.best_score)
        self.position = torch.where(better, position, self.position)
        self.evaluations += 1
