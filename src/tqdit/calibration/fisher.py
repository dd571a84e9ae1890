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

from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.rows import CalibrationRows, sampling_of
from tqdit.models.loaded import LoadedModel
from tqdit.sampling.noise import normal
from tqdit.sampling.process import Unsampled

COTANGENTS = 2**41  # image numbers from here on draw cotangents, apart from every noise

# (rows, their indices (N,), output (N, K, ...), model, config) -> cotangent (N, K, ...)
Fisher = Callable[[CalibrationRows, Tensor, Tensor, LoadedModel, QuantizationConfig], Tensor]


def plain(
    rows: CalibrationRows, index: Tensor, output: Tensor, model: LoadedModel, config: QuantizationConfig
) -> Tensor:
    """v ~ N(0, I) on the prediction, 0 on the other channels. A row's v does not depend on its batch."""
    shape = tuple(rows.target.shape[1:])
    cotangent = torch.zeros_like(output)
    draws = np.stack([normal(config.seed, COTANGENTS + int(row), 0, shape) for row in index])
    cotangent[:, : shape[0]] = torch.from_numpy(draws).to(output.device)
    return cotangent


def step_weighted(
    rows: CalibrationRows, index: Tensor, output: Tensor, model: LoadedModel, config: QuantizationConfig
) -> Tensor:
    """v times the factor with which an error of the prediction enters the next state, at each row's own step.

    v alone if no chain is known.
    """
    cotangent, spec = plain(rows, index, output, model, config), sampling_of(model, config)
    if isinstance(spec.process, Unsampled):
        return cotangent
    factor = torch.from_numpy(spec.schedule.error_weights).float().to(output.device)[rows.step[index]]
    return cotangent * factor.reshape(-1, *[1] * (output.ndim - 1))


def guided(
    rows: CalibrationRows, index: Tensor, output: Tensor, model: LoadedModel, config: QuantizationConfig
) -> Tensor:
    """As `step_weighted`, times the weight of each row in the guided prediction, at the scale of the chains.

    A conditional row counts g times, its unconditional partner |1 - g| times; if guidance leaves a channel as it is,
    1 and 0.
    """
    cotangent = step_weighted(rows, index, output, model, config)
    if model.guidance is None or config.guidance_scale is None:
        return cotangent
    weights = model.guidance.weights(config.guidance_scale, rows.target.shape[1])
    factor = torch.from_numpy(weights).float().to(output.device)[index % 2]  # of a pair, the conditional row is first
    cotangent[:, : factor.shape[1]] *= factor.reshape(*factor.shape, *[1] * (output.ndim - 2))
    return cotangent


def loss_gradient(
    rows: CalibrationRows, index: Tensor, output: Tensor, model: LoadedModel, config: QuantizationConfig
) -> Tensor:
    """2 (prediction - target), the gradient of the paper's loss (eq. 11) on rows that were noised with known noise."""
    channels = rows.target.shape[1]
    cotangent = torch.zeros_like(output)
    cotangent[:, :channels] = 2 * (output[:, :channels] - rows.target[index])
    return cotangent


FISHERS: dict[str, Fisher] = {"guided": guided, "step": step_weighted, "plain": plain, "loss": loss_gradient}
