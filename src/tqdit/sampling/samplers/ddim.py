"""Deterministic sampling (DDIM, arXiv 2010.02502, eq. 12 with sigma 0)."""

from __future__ import annotations

import numpy as np

from tqdit.sampling.process import Diffusion, Float64
from tqdit.sampling.schedule import Schedule, single_step

PROCESS = Diffusion


def schedule(process: Diffusion, timesteps: Float64) -> Schedule:
    abar = process.alphas_cumprod[timesteps.astype(np.int64)]
    prev = np.append(1.0, abar[:-1])
    from_state = np.sqrt(prev / abar)
    return single_step(timesteps, from_state, np.sqrt(1 - prev) - from_state * np.sqrt(1 - abar))
