"""The weights of Hessian-guided optimization (HO): a cotangent at the network's output, whose image g = J^T v at a
layer's output weighs that output's errors by g^2.

With v ~ N(0, I), E[g^2] = diag(J^T J): an unbiased Gauss-Newton diagonal that needs no data set. The gradient of the
squared error against the float output is never used: it is zero if the rest of the network is float.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tqdit.calibration.rows import CalibrationRows
from tqdit.sampling.noise import normal
from tqdit.sampling.process import Unsampled
from tqdit.sampling.schedule import SamplingSpec

COTANGENTS = 2**41  # image numbers from here on draw cotangents, apart from every noise

# (rows, their indices (N,), output (N, K, ...), spec, seed) -> cotangent (N, K, ...)
Fisher = Callable[[CalibrationRows, Tensor, Tensor, SamplingSpec, int], Tensor]


def plain(rows: CalibrationRows, index: Tensor, output: Tensor, spec: SamplingSpec, seed: int) -> Tensor:
    """v ~ N(0, I) on the prediction, 0 on the other channels. A row's v does not depend on its batch."""
    shape = tuple(rows.target.shape[1:])
    cotangent = torch.zeros_like(output)
    draws = np.stack([normal(seed, COTANGENTS + int(row), 0, shape) for row in index])
    cotangent[:, : shape[0]] = torch.from_numpy(draws).to(output.device)
    return cotangent


def step_weighted(rows: CalibrationRows, index: Tensor, output: Tensor, spec: SamplingSpec, seed: int) -> Tensor:
    """v times the factor with which an error of the prediction enters the next state, at each row's own step.

    v alone if no chain is known.
    """
    if isinstance(spec.process, Unsampled):
        return plain(rows, index, output, spec, seed)
    factor = torch.from_numpy(spec.schedule.error_weights).float().to(output.device)[rows.step[index]]
    return plain(rows, index, output, spec, seed) * factor.reshape(-1, *[1] * (output.ndim - 1))


def loss_gradient(rows: CalibrationRows, index: Tensor, output: Tensor, spec: SamplingSpec, seed: int) -> Tensor:
    """2 (prediction - target), the gradient of the paper's loss (eq. 11) on rows that were noised with known noise."""
    channels = rows.target.shape[1]
    cotangent = torch.zeros_like(output)
    cotangent[:, :channels] = 2 * (output[:, :channels] - rows.target[index])
    return cotangent


FISHERS: dict[str, Fisher] = {"step": step_weighted, "plain": plain, "loss": loss_gradient}
