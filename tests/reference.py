"""The arithmetic of diffusion sampling as the papers write it, in float64 NumPy, one step of every row at a time.

Sources: DDPM (arXiv 2006.11239), improved DDPM (2102.09672: respacing, learned variance), DDIM (2010.02502),
classifier-free guidance (2207.12598). Nothing here is shared with the package.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def timesteps(steps: int, spacing: str = "linspace", offset: int = 0) -> NDArray[np.int64]:
    """Ascending: DiT's fractional stride, or diffusers' "leading"."""
    if spacing == "leading":
        return np.arange(steps) * (1000 // steps) + offset
    return np.round(np.linspace(0, 999, steps)).astype(np.int64)


def alphas_cumprod(chain: NDArray[np.int64]) -> tuple[Float64, Float64]:
    """abar of a respaced chain, and of the step before, for linear betas."""
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[chain]
    return abar, np.append(1.0, abar[:-1])


def ddpm_step(chain: NDArray[np.int64], x: Float64, output: Float64, step: int, noise: Float64) -> Float64:
    """Predicted x_0, posterior mean (eq. 7), and a learned-range variance (improved DDPM, eq. 15) or beta."""
    every, every_prev = alphas_cumprod(chain)
    betas = 1 - every / every_prev
    abar, prev, beta = every[step], every_prev[step], betas[step]
    eps, fraction = output[:, : x.shape[1]], (output[:, x.shape[1] :] + 1) / 2
    x0 = np.sqrt(1 / abar) * x - np.sqrt(1 / abar - 1) * eps
    mean = beta * np.sqrt(prev) / (1 - abar) * x0 + (1 - prev) * np.sqrt(1 - beta) / (1 - abar) * x
    if step == 0:
        return mean
    posterior = beta * (1 - prev) / (1 - abar)
    log_variance = fraction * np.log(beta) + (1 - fraction) * np.log(posterior) if fraction.size else np.log(beta)
    return mean + np.exp(0.5 * log_variance) * noise


def ddim_step(chain: NDArray[np.int64], x: Float64, output: Float64, step: int) -> Float64:
    """Predicted x_0, noised again to the step before (eq. 12 with sigma 0)."""
    every, every_prev = alphas_cumprod(chain)
    abar, prev, eps = every[step], every_prev[step], output[:, : x.shape[1]]
    x0 = (x - np.sqrt(1 - abar) * eps) / np.sqrt(abar)
    return np.sqrt(prev) * x0 + np.sqrt(1 - prev) * eps


def guide(conditional: Float64, unconditional: Float64, scale: float, channels: int) -> Float64:
    """u + scale (c - u) on the first channels, the conditional output on the others."""
    c, u = conditional[:, :channels], unconditional[:, :channels]
    return np.concatenate([u + scale * (c - u), conditional[:, channels:]], axis=1)
