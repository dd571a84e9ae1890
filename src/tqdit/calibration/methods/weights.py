"""Scales of weights from the weights alone: of all candidates, the one with the smallest sum of (w^ - w)^2.

No activation is looked at. A network whose activations find their scales while it runs (the scheme `dynamic`) needs no
calibration rows, then: `sites` makes its scale table in the time that it takes to read the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.layers import LayerPlan
from tqdit.calibration.methods.search import Ladder
from tqdit.calibration.operands import Weight
from tqdit.calibration.problem import Problem, Solution
from tqdit.errors import UsageError
from tqdit.models.loaded import LoadedModel
from tqdit.quantization.granularity import PerToken
from tqdit.quantization.quantizer import Parameters
from tqdit.quantization.schemes import find_schemes
from tqdit.quantization.table import Site


def solve(problem: Problem, config: QuantizationConfig) -> Solution:
    """The method for a layer of which there are samples; other operands keep the range of those."""
    parameters = problem.initial
    operand = problem.operands.get("weight")
    if isinstance(operand, Weight):
        parameters["weight"] = nearest(operand)
    return Solution(parameters, (problem.objective(parameters),), problem.multiply_adds)


def nearest(operand: Weight) -> Parameters:
    """The scale of each entry that leaves the smallest squared error of the weight."""

    def score(values: Tensor) -> Tensor:
        return operand.entries(operand.quantize({"scale": values}).sub_(operand.x).square_().t())

    ladder = Ladder(operand.grid("scale"), operand.initial["scale"], score)
    ladder.sweep(range(len(ladder.grid)))
    return {"scale": ladder.best}


def check(plans: tuple[LayerPlan, ...]) -> None:
    """Refuse, before any work, operands whose scales need calibration rows."""
    for entry in plans:
        for role, operand in entry.operands.items():
            if role != "weight" and find_schemes()[operand.scheme].tensors:
                raise UsageError(
                    f"'{entry.name}.{role}' has scheme '{operand.scheme}', whose scales need calibration rows; "
                    "--method weights takes none. Pass a preset that searches (--preset tq-dit), or --inputs dynamic "
                    "--gelu uniform --no-attention."
                )


@torch.no_grad()
def sites(model: LoadedModel, plans: tuple[LayerPlan, ...], config: QuantizationConfig) -> Iterator[Site]:
    """Every site of a table, in the order of the network's calls. `check` has passed the plans."""
    factors = torch.linspace(config.alpha, config.beta, config.candidates).to(model.device)
    for entry in plans:
        for role, plan in entry.operands.items():
            if role == "weight":
                weight = model.weight(entry.name)
                assert weight is not None
                operand = Weight(weight.flatten(1), plan, factors)
                yield Site(entry.name, role, operand.quantizer(nearest(operand)))
            else:
                yield Site(entry.name, role, find_schemes()[plan.scheme](plan.bits, PerToken()))
