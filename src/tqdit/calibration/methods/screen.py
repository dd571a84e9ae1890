"""Which weight scales deserve a full product.

The error of an output channel jumps up and down as its scale changes, since a few hundred weights change their codes
one by one. Going from coarse to fine candidates misses the best ones (measured: 4 % at the median); so all candidates
are scored cheaply, and the best few of each entry exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tqdit.calibration.operands import Weight
from tqdit.calibration.problem import Problem

HEAVIEST = 0.125  # share of the samples that a Hessian-weighted screening looks at
FINALISTS = 6


def finalists(problem: Problem, operand: Weight, left: Tensor, grid: Tensor) -> tuple[Tensor, int]:
    """Grid positions (FINALISTS, E) for each entry of `grid` (n, E), and the multiply-adds that it took.

    `left` is the other operand as it is quantized now.
    """
    x, target = left.reshape(-1, left.shape[-1]), problem.target.reshape(-1, problem.target.shape[-1])
    if problem.g2 is None:
        score, multiply_adds = _by_gram_matrix(operand, x, target, len(grid))
    else:
        score, multiply_adds = _by_heaviest_samples(operand, x, target, problem.g2.reshape(target.shape), len(grid))
    scores = torch.empty_like(grid)  # a list of small results between large temporaries would fragment the heap
    for index, values in enumerate(grid):
        scores[index] = score(operand.quantize({"scale": values}))
    return scores.topk(min(FINALISTS, len(grid)), dim=0, largest=False).indices, multiply_adds


def _by_heaviest_samples(
    operand: Weight, x: Tensor, target: Tensor, g2: Tensor, candidates: int
) -> tuple[Callable[[Tensor], Tensor], int]:
    """The objective over the samples with the largest weights, which are most of it: g^2 has heavy tails."""
    count = max(1, int(HEAVIEST * len(x)))
    heavy = g2.sum(1, dtype=torch.float32).topk(count).indices
    x, target, g2 = x[heavy], target[heavy], g2[heavy]

    def score(weight: Tensor) -> Tensor:
        return operand.entries((x @ weight.t()).sub_(target).square_().mul_(g2))

    return score, candidates * x.numel() * len(operand.x)


def _by_gram_matrix(
    operand: Weight, x: Tensor, target: Tensor, candidates: int
) -> tuple[Callable[[Tensor], Tensor], int]:
    """The unweighted objective exactly, from K x K and K x O matrices: with d = W^ - W and e = x^ W^T - z it is
    d A d^T + 2 d B up to a constant, A = x^^T x^, B = x^^T e."""
    gram = x.t() @ x
    cross = x.t() @ (x @ operand.x.t() - target)  # (K, O)

    def score(weight: Tensor) -> Tensor:
        difference = weight - operand.x
        per_channel = ((difference @ gram) * difference).sum(1) + 2 * (difference * cross.t()).sum(1)
        return operand.entries(per_channel[None])

    setup = x.numel() * (x.shape[1] + 2 * len(operand.x))
    return score, setup + candidates * operand.x.numel() * x.shape[1]
