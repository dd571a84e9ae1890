"""What a method solves: one product, its operands, and the error that counts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tqdit.calibration.capture import Samples
from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.layers import LayerPlan
from tqdit.calibration.operands import Activation, Operand, Weight
from tqdit.quantization.granularity import ROLES, Role
from tqdit.quantization.quantizer import Parameters


@dataclass(frozen=True, eq=False)
class Problem:
    """A product left right^T (linear; right (O, K) is the weight) or left right (attention), partly quantized.

    The objective is sum g^2 (z^ - z)^2 over every kept element of z (eq. 15 and 16); g2 None means g = 1 (MSE).
    `operands` are those to quantize, in the order in which a search visits them. carried: the error that earlier parts
    of the same layer left in z, which this part can mend.
    """

    left: Tensor
    right: Tensor
    is_linear: bool
    g2: Tensor | None
    operands: dict[Role, Operand]
    carried: Tensor | None = None

    @cached_property
    def target(self) -> Tensor:
        """The float product z, without what is carried."""
        z = self.product(self.left, self.right)
        return z if self.carried is None else z - self.carried

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ (right.t() if self.is_linear else right)

    @property
    def multiply_adds(self) -> int:
        """Of one product."""
        return int(self.left.numel()) * int(self.target.shape[-1])

    def quantized(self, role: Role, parameters: dict[Role, Parameters]) -> Tensor:
        if role in self.operands:
            return self.operands[role].quantize(parameters[role])
        return self.left if role in ("left", "input") else self.right

    def error(self, left: Tensor, right: Tensor) -> Tensor:
        """g^2 (z^ - z)^2, elementwise."""
        squared = self.product(left, right).sub_(self.target).square_()
        return squared if self.g2 is None else squared.mul_(self.g2)

    def sides(self, parameters: dict[Role, Parameters]) -> tuple[Tensor, Tensor]:
        """Both operands as they are under `parameters`."""
        roles: tuple[Role, Role] = ("input", "weight") if self.is_linear else ("left", "right")
        return self.quantized(roles[0], parameters), self.quantized(roles[1], parameters)

    def objective(self, parameters: dict[Role, Parameters]) -> float:
        return float(self.error(*self.sides(parameters)).sum(dtype=torch.float64))

    def relative(self, objective: float) -> float:
        """The objective over that of an output of zeros."""
        energy = self.target.square()
        if self.g2 is not None:
            energy.mul_(self.g2)
        total = float(energy.sum(dtype=torch.float64))
        return objective / total if total > 0 else 0.0

    def left_over(self, solution: Solution) -> Tensor:
        """The error z^ - z of a solution, like z."""
        left, right = self.sides(solution.parameters)
        weight = self.operands.get("weight")
        if solution.weight_codes is not None and isinstance(weight, Weight):
            right = solution.weight_codes * weight.spread(solution.parameters["weight"]["scale"])
        return self.product(left, right).sub_(self.target)

    @property
    def initial(self) -> dict[Role, Parameters]:
        return {role: operand.initial for role, operand in self.operands.items()}


@dataclass(frozen=True, eq=False)
class Solution:
    """The parameters of each operand. history: the objective at the start and after each improvement.

    weight_codes: the integers of the weight, as float (O, K), if they are not those of rounding to nearest.
    """

    parameters: dict[Role, Parameters]
    history: tuple[float, ...]
    multiply_adds: int  # that it took
    weight_codes: Tensor | None = None


def make_problem(
    plan: LayerPlan, samples: Samples, weight: Tensor | None, group: Tensor, config: QuantizationConfig
) -> Problem:
    """One layer's problem; `weight` (O, ...) if it has one, group (R,) of each row."""
    factors = torch.linspace(config.alpha, config.beta, config.candidates).to(samples.left.device)
    operands: dict[Role, Operand] = {}
    matrix = None if weight is None else weight.detach().flatten(1)
    for role in ROLES:  # W then X, A then B (Algorithm 1)
        if role not in plan.operands:
            continue
        if role == "weight":
            assert matrix is not None
            operands[role] = Weight(matrix, plan.operands[role], factors)
        else:
            side = "right" if role == "right" else "left"
            x = samples.right if side == "right" else samples.left
            assert x is not None
            operands[role] = Activation(x, plan.operands[role], factors, group, *samples.ranges[side], samples.rows)
    right = samples.right if matrix is None else matrix
    assert right is not None
    g2 = samples.g2 if config.metric == "ho" else None
    return Problem(samples.left, right, matrix is not None, g2, operands)
