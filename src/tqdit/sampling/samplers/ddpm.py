"""Ancestral sampling (DDPM, arXiv 2006.11239, eq. 7 and 11), with a learned variance if the network has one."""

from __future__ import annotations

import numpy as np

from tqdit.sampling.process import Diffusion, Float64
from tqdit.sampling.schedule import Schedule, single_step

PROCESS = Diffusion


def schedule(process: Diffusion, timesteps: Float64) -> Schedule:
    """Two weights in place of a predicted x_0 avoid its cancellation at noisy steps, where sqrt(1 / abar) is 157."""
    abar = process.alphas_cumprod[timesteps.astype(np.int64)]
    prev = np.append(1.0, abar[:-1])
    beta = 1 - abar / prev  # recomputed for the respaced chain
    mean_x0 = beta * np.sqrt(prev) / (1 - abar)
    mean_xt = (1 - prev) * np.sqrt(1 - beta) / (1 - abar)
    from_state = mean_x0 * np.sqrt(1 / abar) + mean_xt
    from_output = -mean_x0 * np.sqrt(1 / abar - 1)
    low = _posterior_log_variance(abar, prev, beta)
    noisy = (np.arange(len(timesteps)) > 0).astype(np.float64)  # the last step adds no noise
    if process.learned_variance:
        return single_step(timesteps, from_state, from_output, noisy, (low, np.log(beta)))
    # "fixed large" of improved DDPM: beta, except for the last step
    return single_step(timesteps, from_state, from_output, noisy * np.sqrt(beta))


def _posterior_log_variance(abar: Float64, prev: Float64, beta: Float64) -> Float64:
    """log of the posterior variance, with the zero at step 0 replaced by its neighbour (as improved DDPM does)."""
    if len(beta) == 1:
        return np.log(beta)
    variance = beta * (1 - prev) / (1 - abar)  # zero at step 0
    return np.log(variance[[1, *range(1, len(variance))]])
