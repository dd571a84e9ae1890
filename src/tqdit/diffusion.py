"""The arithmetic of diffusion sampling, in NumPy: schedules, posteriors, guidance.

Sources: DDPM (arXiv 2006.11239), improved DDPM (2102.09672: respacing, learned variance), DDIM (2010.02502),
classifier-free guidance (2207.12598). These functions define what an exported step graph must compute.

A chain of T steps is counted as the engine counts it: step T-1 is the noisiest, step 0 the cleanest. A *timestep*
is what the network is told: a position 0..999 in the chain it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import UsageError

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

TRAINING_STEPS = 1000

SamplerName = Literal["ddpm", "ddim"]
SpacingName = Literal["linspace", "leading"]
SAMPLERS: tuple[SamplerName, ...] = ("ddpm", "ddim")

BETA_SCHEDULES: dict[str, Callable[[float, float], Float64]] = {
    "linear": lambda start, end: np.linspace(start, end, TRAINING_STEPS),
    "scaled_linear": lambda start, end: np.linspace(start**0.5, end**0.5, TRAINING_STEPS) ** 2,
}


@dataclass(frozen=True)
class SamplingSpec:
    """Everything that decides how one step is computed, apart from the network. Travels inside the ONNX file."""

    steps: int = 250
    sampler: SamplerName = "ddpm"
    spacing: SpacingName = "linspace"  # linspace: round(linspace(0, 999, T)); leading: multiples of 1000 // T
    steps_offset: int = 0  # added to every timestep of the leading spacing
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    guided_channels: int | None = None  # how many leading noise channels guidance moves; None: all

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= TRAINING_STEPS:
            raise UsageError(
                f"--steps is {self.steps}; a chain has 1 to {TRAINING_STEPS} steps. Pass a number in that range."
            )
        if self.sampler not in SAMPLERS:
            raise UsageError(f"unknown sampler '{self.sampler}'; known are {', '.join(SAMPLERS)}.")
        if self.spacing not in ("linspace", "leading"):
            raise UsageError(f"unknown timestep spacing '{self.spacing}'; known are linspace, leading.")
        if self.steps_offset < 0 or not 0 < self.beta_start <= self.beta_end < 1:
            raise UsageError(
                f"betas from {self.beta_start} to {self.beta_end} with steps_offset {self.steps_offset}; expected "
                "0 < beta_start <= beta_end < 1 and an offset of at least 0."
            )
        if self.beta_schedule not in BETA_SCHEDULES:
            raise UsageError(f"unknown beta schedule '{self.beta_schedule}'; known are {', '.join(BETA_SCHEDULES)}.")

    @cached_property
    def schedule(self) -> Schedule:
        betas = BETA_SCHEDULES[self.beta_schedule](self.beta_start, self.beta_end)
        alphas_cumprod = np.cumprod(1 - betas, dtype=np.float64)
        return Schedule(space_timesteps(self.steps, self.spacing, self.steps_offset), alphas_cumprod)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SamplingSpec:
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def space_timesteps(steps: int, spacing: SpacingName = "linspace", offset: int = 0) -> Int64:
    """The T timesteps of a respaced chain, ascending.

    `linspace` is DiT's own (improved DDPM's fractional stride), `leading` that of diffusers' DDIMScheduler.
    """
    if spacing == "linspace":
        return np.round(np.linspace(0, TRAINING_STEPS - 1, steps)).astype(np.int64)
    return np.arange(steps, dtype=np.int64) * (TRAINING_STEPS // steps) + offset


class Schedule:
    """A respaced chain: its timesteps (T,) and, in float64, the quantities of DDPM at them, all (T,)."""

    def __init__(self, timesteps: Int64, training_alphas_cumprod: Float64) -> None:
        if timesteps[-1] >= len(training_alphas_cumprod):
            raise UsageError(
                f"the chain's last timestep is {timesteps[-1]}, beyond {len(training_alphas_cumprod) - 1}: "
                "the spacing's offset is too large for this number of steps."
            )
        self.timesteps = timesteps
        self.alphas_cumprod = training_alphas_cumprod[timesteps]  # abar_t
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.betas = 1 - self.alphas_cumprod / self.alphas_cumprod_prev  # recomputed for the respaced chain
        self.posterior_variance = (
            self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        )  # DDPM eq. 7; zero at step 0

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def posterior_log_variance(self) -> Float64:
        """log of the posterior variance, with the zero at step 0 replaced by its neighbour (as improved DDPM does)."""
        variance = self.betas if len(self) == 1 else self.posterior_variance[[1, *range(1, len(self))]]
        log_variance: Float64 = np.log(variance)
        return log_variance


@dataclass(frozen=True)
class StepCoefficients:
    """One step as x' = from_x x + from_eps eps + noise_mask exp(log_variance / 2) noise, per step (T,) float64.

    log_variance = frac max_log_variance + (1 - frac) min_log_variance, frac = (v + 1) / 2 of the learned fraction v
    (improved DDPM eq. 15), or fixed_log_variance for a model that learns none. Folding the predicted x_0 into two
    coefficients avoids its cancellation at noisy steps, where sqrt(1 / abar) is about 157.
    """

    from_x: Float64
    from_eps: Float64
    min_log_variance: Float64
    max_log_variance: Float64
    fixed_log_variance: Float64
    noise_mask: Float64


def step_coefficients(schedule: Schedule, sampler: SamplerName) -> StepCoefficients:
    """The coefficients of a sampler's update at every step of a chain."""
    abar, prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    x0_from_x, x0_from_eps = np.sqrt(1 / abar), -np.sqrt(1 / abar - 1)
    log_beta = np.log(schedule.betas)
    log_posterior = schedule.posterior_log_variance
    # "fixed large" of improved DDPM: beta, except for the last step, which takes the smallest posterior variance
    fixed = np.append(log_posterior[:1], log_beta[1:])
    if sampler == "ddim":
        zero = np.zeros_like(abar)
        from_x = np.sqrt(prev) * x0_from_x
        return StepCoefficients(
            from_x, np.sqrt(prev) * x0_from_eps + np.sqrt(1 - prev), log_posterior, log_beta, fixed, zero
        )
    mean_x0 = schedule.betas * np.sqrt(prev) / (1 - abar)  # DDPM eq. 7
    mean_xt = (1 - prev) * np.sqrt(1 - schedule.betas) / (1 - abar)
    mask = (np.arange(len(schedule)) > 0).astype(np.float64)  # the last step adds no noise
    return StepCoefficients(mean_x0 * x0_from_x + mean_xt, mean_x0 * x0_from_eps, log_posterior, log_beta, fixed, mask)


def ddpm_step(schedule: Schedule, x: Float64, output: Float64, step: Int64, noise: Float64) -> Float64:
    """One ancestral DDPM step as published: predicted x_0, posterior mean (eq. 7), learned-range variance.

    x, noise (B, C, H, W); output (B, 2C or C, H, W), the network's guided output; step (B,) in T-1..0.
    """
    at = _per_row(step)
    eps, variance = output[:, : x.shape[1]], output[:, x.shape[1] :]
    abar, prev, beta = (
        at(schedule.alphas_cumprod), at(schedule.alphas_cumprod_prev), at(schedule.betas)
    )  # fmt: skip
    x0 = np.sqrt(1 / abar) * x - np.sqrt(1 / abar - 1) * eps
    mean = beta * np.sqrt(prev) / (1 - abar) * x0 + (1 - prev) * np.sqrt(1 - beta) / (1 - abar) * x
    if variance.shape[1]:
        fraction = (variance + 1) / 2
        log_variance = fraction * np.log(beta) + (1 - fraction) * at(schedule.posterior_log_variance)
    else:
        log_variance = at(step_coefficients(schedule, "ddpm").fixed_log_variance)
    return mean + np.where(_column(step) > 0, np.exp(0.5 * log_variance) * noise, 0.0)


def ddim_step(schedule: Schedule, x: Float64, output: Float64, step: Int64) -> Float64:
    """One deterministic DDIM step (eq. 12 with sigma = 0). Shapes as in `ddpm_step`."""
    at = _per_row(step)
    eps = output[:, : x.shape[1]]
    abar, prev = at(schedule.alphas_cumprod), at(schedule.alphas_cumprod_prev)
    x0 = (x - np.sqrt(1 - abar) * eps) / np.sqrt(abar)
    return np.sqrt(prev) * x0 + np.sqrt(1 - prev) * eps


def guide(conditional: Float64, unconditional: Float64, scale: Float64, guided_channels: int) -> Float64:
    """Classifier-free guidance: u + scale (c - u) on the first channels, the conditional output on the others.

    Outputs (B, K, H, W), scale (B,). The learned variance is never guided.
    """
    c, u = conditional[:, :guided_channels], unconditional[:, :guided_channels]
    return np.concatenate([u + _column(scale) * (c - u), conditional[:, guided_channels:]], axis=1)


def _column(values: NDArray[Any]) -> NDArray[Any]:
    return values.reshape(-1, 1, 1, 1)


def _per_row(step: Int64) -> Callable[[Float64], Float64]:
    return lambda table: _column(table[step])
