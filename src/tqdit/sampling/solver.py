"""Solvers that work with the predicted data, as tables: shared by the samplers of several steps.

A chain goes from noise to data along x = a x_0 + b noise. Where it stands is lambda = log(a / b). A step of length h in
lambda keeps b' / b of the state; solvers differ in the integral of the predicted data over it (DPM-Solver++, arXiv
2211.01095, eq. 9).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tqdit.sampling.process import Diffusion, Float64, Flow
from tqdit.sampling.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Path:
    """Where a chain of T steps stands before and after each of them. Arrays (T,), indexed by the step.

    Before the first step of a flow, and after the last step of any chain, h is infinite.
    """

    timesteps: Float64
    data_weight: Float64  # a after the step
    kept: Float64  # b after the step / b before it
    noise: Float64  # b after the step
    length: Float64  # h
    clean: tuple[Float64, Float64]  # x_0 = clean[0] x + clean[1] prediction

    @property
    def gain(self) -> Float64:
        """a' (1 - exp(-h)): the weight of the predicted data if it did not change during the step."""
        return -self.data_weight * np.expm1(-self.length)

    @property
    def slope(self) -> Float64:
        """h / (2 h_before): how much of the last change of the predicted data a second-order step adds.

        Zero in the first step, in the last one, which has no end in lambda, and after a step of infinite length.
        """
        before = np.append(self.length[1:], np.inf)
        with np.errstate(invalid="ignore"):
            return np.where(np.isinf(before) | np.isinf(self.length), 0.0, self.length / before / 2)


def noisy_timesteps(process: Diffusion | Flow, steps: int) -> Float64:
    return process.noisy_timesteps(steps)


def path_of(process: Diffusion | Flow, timesteps: Float64) -> Path:
    a, b = process.mix(timesteps)
    with np.errstate(divide="ignore"):
        snr = np.append(np.inf, np.log(a) - np.log(b))
    after_a, after_b = np.append(1.0, a[:-1]), np.append(0.0, b[:-1])
    return Path(timesteps, after_a, after_b / b, after_b, snr[:-1] - snr[1:], process.clean(timesteps))


def from_data(path: Path, data: Float64, kept: Float64 | None = None, noise_weight: Float64 | None = None) -> Schedule:
    """x' = kept x + sum_j data[s, j] x_0 as predicted j steps before + noise_weight noise, as a table.

    data: (T, L + 1). kept: `path.kept` if None.
    """
    steps, lags = data.shape
    states, outputs = np.zeros_like(data), np.zeros_like(data)
    for lag in range(lags):
        for weights, clean in zip((states, outputs), path.clean, strict=True):
            weights[: steps - lag, lag] = data[: steps - lag, lag] * clean[lag:]
    states[:, 0] += path.kept if kept is None else kept
    noise = np.zeros(steps) if noise_weight is None else noise_weight
    return Schedule(path.timesteps, states, outputs, noise, np.ones(steps))
