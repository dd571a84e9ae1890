"""Search, then weights rounded with error feedback (GPTQ, arXiv 2210.17323) towards a least-squares target.

The inputs are quantized and fixed, so the best float weight for them is not W but W* = argmin sum u ||x^ W*^T - z||^2,
and rounding one column of W* changes what the columns after it should be. u is a sample's g^2, averaged over channels:
one matrix H = sum u x^ x^^T serves all channels. Scales beside the one that is best for rounding to nearest are tried
as well, and the best one is kept. The result is kept if it lowers the layer's objective.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.methods import search
from tqdit.calibration.operands import Activation, Weight
from tqdit.calibration.problem import Problem, Solution
from tqdit.quantization.rounding import code_range

DAMPING = 0.01  # of H, times its mean diagonal: columns that the samples hardly excite stay near W
FACTORS = (1.0, 0.92, 1.08)  # of the scale that a search found


def solve(problem: Problem, config: QuantizationConfig) -> Solution:
    found = search.solve(problem, config)
    operand = problem.operands.get("weight")
    if not isinstance(operand, Weight):
        return found
    left, _ = problem.sides(found.parameters)
    start = found.parameters["weight"]["scale"]  # (E,)
    hessian, cross = _normal_equations(problem, left, config.fisher_temperature)
    order = hessian.diagonal().argsort(descending=True)  # what counts most is rounded first, and mended by all others
    factor = torch.linalg.cholesky(hessian[order][:, order])
    target = operand.x[:, order].double() - torch.cholesky_solve(cross[order], factor).t()
    best, scale, codes = torch.full_like(start, torch.inf), start, torch.zeros_like(operand.x)
    for each in FACTORS:
        tried = operand.per_channel(start * each)[:, None]  # (O, 1)
        rounded = _round(target, tried.double(), factor, operand.plan.bits).float()[:, order.argsort()]
        error = operand.entries(problem.error(left, rounded * tried))
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, start * each, scale)
        codes = torch.where(operand.per_channel(better)[:, None], rounded, codes)
    samples, (channels, width) = left.numel() // left.shape[-1], operand.x.shape
    count = len(FACTORS)
    spent = samples * width * (width + (2 + count) * channels) + width**2 * (width + (1 + count) * channels)
    found = replace(found, multiply_adds=found.multiply_adds + spent)
    objective = float(best.sum(dtype=torch.float64))
    if objective >= found.history[-1]:
        return found
    parameters = {**found.parameters, "weight": {**found.parameters["weight"], "scale": scale}}
    return replace(found, parameters=parameters, history=(*found.history, objective), weight_codes=codes)


def _normal_equations(problem: Problem, left: Tensor, temperature: float = 0.0) -> tuple[Tensor, Tensor]:
    """H = sum u x^ x^^T, damped, (K, K), and sum u x^ (x^ W^T - z), (K, O); float64. temperature: of u over time."""
    x, z = left.reshape(-1, left.shape[-1]), problem.target.reshape(-1, problem.target.shape[-1])
    u = (
        torch.ones(len(x), 1, device=x.device)
        if problem.g2 is None
        else problem.g2.reshape(z.shape).mean(1, keepdim=True, dtype=torch.float32)
    )
    operand = problem.operands.get("input")
    if temperature and isinstance(operand, Activation) and len(operand.own_group) == len(left):
        samples = operand.own_group.repeat_interleave(len(x) // len(left))
        u = temporal_weights(u[:, 0], samples, temperature)[:, None]
    u = u / u.mean().clamp(min=torch.finfo(torch.float32).tiny)
    hessian = (x.t() @ (u * x)).double()
    cross = (x.t() @ (u * (x @ problem.right.t() - z))).double()
    damping = DAMPING * hessian.diagonal().mean().clamp(min=1e-12)
    return hessian + damping * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device), cross


def temporal_weights(u: Tensor, group: Tensor, temperature: float) -> Tensor:
    """alpha of each sample's group (AdaTSQ): softmax(I / temperature), I the mean of u in a group over that of all.

    u, group (S,): the weight of each sample, and its group of timesteps.
    """
    groups = int(group.max()) + 1
    count = torch.zeros(groups, device=u.device).index_add(0, group, torch.ones_like(u))
    information = torch.zeros(groups, device=u.device).index_add(0, group, u) / count.clamp(min=1)
    information = information / information[count > 0].mean().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.softmax(information / temperature, 0)[group]


def _round(weight: Tensor, scale: Tensor, factor: Tensor, bits: int) -> Tensor:
    """Codes (O, K) of `weight` (O, K), one column after the other, each error passed on to the columns after it.

    `factor` is the Cholesky factor of H.
    """
    low, high = code_range(bits)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)  # H^-1 = U^T U
    weight, codes = weight.clone(), torch.empty_like(weight)
    for column in range(weight.shape[1]):
        exact = weight[:, column : column + 1]
        code = torch.clamp(torch.round(exact / scale), low, high)
        codes[:, column : column + 1] = code
        error = (exact - code * scale) / upper[column, column]
        weight[:, column + 1 :] -= error * upper[column, column + 1 :]
    return codes
