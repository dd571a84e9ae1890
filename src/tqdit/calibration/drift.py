"""Group boundaries placed where the activations drift, instead of evenly (`--boundaries drift`).

Of every step of the chains and every operand of a product, the drift keeps two logarithms: of the largest magnitude,
which decides a range, and of the root mean square, which decides what a step size costs. Steps in one group should be
alike, so the boundaries minimise the squared distance of the steps to the mean of their group; the best contiguous
grouping is found exactly, by dynamic programming over the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tqdit.errors import UsageError
from tqdit.models.loaded import LoadedModel
from tqdit.models.products import watched

TINY = 1e-12  # of an operand that is all zeros


class Drift:
    """Statistics (T, F) of the operands of every product at each step of the chains."""

    def __init__(self, model: LoadedModel, steps: int) -> None:
        self._network, self._names = model.network, [product.name for product in model.products]
        self.statistics = torch.zeros(steps, 0)
        self._steps = steps

    @contextmanager
    def listen(self, step: int) -> Iterator[None]:
        """Measure the forward pass that runs inside."""
        found: list[Tensor] = []

        def measure(_name: str, _module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            for x in inputs:
                magnitude = torch.stack([x.abs().amax(), x.square().mean().sqrt()])
                found.append(magnitude.clamp(min=TINY).log())

        with watched(self._network, self._names, measure):
            yield
        row = torch.cat(found).cpu()
        if not self.statistics.shape[1]:
            self.statistics = torch.zeros(self._steps, len(row))
        self.statistics[step] = row


def place_boundaries(
    statistics: NDArray[np.float64], timesteps: NDArray[np.float64], groups: int
) -> NDArray[np.float64]:
    """The boundaries (G - 1,) of G contiguous groups of steps that are most alike.

    statistics (T, F) and timesteps (T,) of the steps 0..T-1, in increasing order of timesteps. A boundary is the first
    timestep of its group. Raises UsageError for more groups than steps.
    """
    steps = len(statistics)
    check_group_count(groups, steps)
    cost = _costs(statistics)
    best = np.full((groups + 1, steps + 1), np.inf)
    origin = np.zeros((groups + 1, steps + 1), np.int64)
    best[0, 0] = 0
    for group in range(1, groups + 1):
        for stop in range(group, steps + 1):
            totals = best[group - 1, :stop] + cost[:stop, stop]
            origin[group, stop] = int(totals.argmin())
            best[group, stop] = totals[origin[group, stop]]
    starts, stop = [], steps
    for group in range(groups, 1, -1):
        stop = int(origin[group, stop])
        starts.append(stop)
    return np.asarray(timesteps, np.float64)[starts[::-1]]


def check_group_count(groups: int, steps: int) -> None:
    """Raises UsageError for more groups than steps of a chain."""
    if groups > steps:
        raise UsageError(f"--groups is {groups}, more than the {steps} steps of a chain. Pass fewer, or more --steps.")


def _costs(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """cost[a, b]: squared distances of the steps a..b-1 to their mean, (T + 1, T + 1), infinite for a >= b."""
    sums = np.concatenate([np.zeros((1, x.shape[1])), x.cumsum(0)])
    squares = np.concatenate([[0.0], np.square(x).sum(1).cumsum()])
    length = len(x) + 1
    cost = np.full((length, length), np.inf)
    for a in range(length - 1):
        count = np.arange(1, length - a)
        total = np.square(sums[a + 1 :] - sums[a]).sum(1)
        cost[a, a + 1 :] = squares[a + 1 :] - squares[a] - total / count
    return cost
