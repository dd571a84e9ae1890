"""Channel equalisation: each input channel is divided by a constant that its weights are multiplied with.

A channel with a large range leaves few codes to all others; its weights are often small. Dividing moves range from the
activation, which has one scale, to the weight, which has one per output channel, and changes nothing in float. Here the
divisors are chosen, from ranges or by salience; `fold` puts them where they cost nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tqdit.calibration.capture import Samples
from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.layers import LayerPlan
from tqdit.calibration.problem import make_problem
from tqdit.models.rotation import hadamard, rotate

STRENGTHS = (0.25, 0.5, 0.75)  # 0.5 gives input and weight the same range in each channel
LIMIT = 100.0  # of a divisor, against channels that the samples hardly excite


@torch.no_grad()
def choose_divisor(
    plan: LayerPlan, samples: Samples, weight: Tensor, group: Tensor, config: QuantizationConfig, block: int = 0
) -> tuple[Tensor | None, int]:
    """The divisors (K,) with which range-based scales do best, None if none helps; and the multiply-adds it took.

    weight (O, K) of the layer; group (R,) of each row of the samples; block: of the rotation after the division.
    """
    matrix = hadamard(block).to(weight.device) if block else None
    best, found, multiply_adds = float("inf"), None, 0
    by_salience = config.equalize == "salience"
    for divisor in (None, *([salience(samples, weight, group)] if by_salience else divisors(samples, weight))):
        divided = samples, weight
        if divisor is not None:
            divided = divide(samples, divisor), weight * divisor
        if matrix is not None:
            divided = rotated(divided[0], matrix), rotate(divided[1], matrix)
        problem = make_problem(plan, *divided, group, config)
        multiply_adds += problem.multiply_adds
        error = problem.objective(problem.initial)
        if error < best:
            best, found = error, divisor
    return found, multiply_adds


def divisors(samples: Samples, weight: Tensor) -> list[Tensor]:
    """Candidate divisors (K,): (max |x_j| / max |W_j|)^strength, with geometric mean 1."""
    inputs = _largest(samples).amax(0)
    return [_divisor(inputs, weight, strength) for strength in STRENGTHS]


def salience(samples: Samples, weight: Tensor, group: Tensor) -> Tensor:
    """PTQ4DiT's divisors (K,): sqrt(s_j(X) / s_j(W)), with geometric mean 1 (arXiv 2405.16005, eq. 5 to 9).

    s(W) = max |W_j|, s(X) = sum_t w_t s(X^(t)), w = softmax_t(-rho_t), rho_t Spearman's correlation of s(X^(t)) and
    s(W): timesteps at which the same channels are large on both sides count less. t: the groups of timesteps, of which
    group (R,) has each row's.
    """
    largest = _largest(samples)
    inputs = torch.stack([largest[group == each].amax(0) for each in torch.unique(group)])  # (T, K)
    rho = torch.stack([_spearman(each, weight.abs().amax(0)) for each in inputs])
    return _divisor((torch.softmax(-rho, 0)[:, None] * inputs).sum(0).float(), weight, 0.5)


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the ranks of two vectors (K,); 0 if one is constant. Float64."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    lengths = ranks.square().sum(1).sqrt()
    return (ranks[0] * ranks[1]).sum() / (lengths[0] * lengths[1]).clamp(min=torch.finfo(torch.float64).tiny)


def _ranks(values: Tensor) -> Tensor:
    """Equal values share the mean of their ranks."""
    below = (values[None] < values[:, None]).sum(1)
    return below + ((values[None] == values[:, None]).sum(1) + 1).double() / 2


def _largest(samples: Samples) -> Tensor:
    """max |x_j| of each row and channel, (R, K)."""
    assert samples.channels is not None
    low, high = samples.channels
    return torch.maximum(low.abs(), high.abs())


def _divisor(inputs: Tensor, weight: Tensor, strength: float) -> Tensor:
    tiny = torch.finfo(torch.float32).tiny
    log = inputs.clamp(min=tiny).log() - weight.abs().amax(0).clamp(min=tiny).log()
    return (strength * (log - log.mean())).exp().clamp(1 / LIMIT, LIMIT)


def divide(samples: Samples, divisor: Tensor) -> Samples:
    """The samples of x / divisor."""
    assert samples.channels is not None
    low, high = (channel / divisor for channel in samples.channels)
    return replace(samples, left=samples.left / divisor, ranges={"left": (low.amin(1), high.amax(1))})


def rotated(samples: Samples, matrix: Tensor) -> Samples:
    """The samples of x H; ranges are those of the kept tokens, of all rows where only some rows are kept."""
    left = rotate(samples.left, matrix)
    low, high = left.flatten(1).amin(1), left.flatten(1).amax(1)
    if samples.rows is not None:
        rows = len(samples.ranges["left"][0])
        low, high = low.amin().expand(rows), high.amax().expand(rows)
    return replace(samples, left=left, ranges={"left": (low, high)})
