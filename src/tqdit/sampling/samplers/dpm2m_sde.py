"""SDE-DPM-Solver++ of second order (arXiv 2211.01095, midpoint form): each step but the last adds noise."""

from __future__ import annotations

import numpy as np

from tqdit.sampling.process import Diffusion, Float64, Flow
from tqdit.sampling.schedule import Schedule
from tqdit.sampling.solver import from_data, noisy_timesteps, path_of

NAME = "dpm++2m-sde"
PROCESS = Diffusion | Flow
visits = noisy_timesteps


def schedule(process: Diffusion | Flow, timesteps: Float64) -> Schedule:
    path = path_of(process, timesteps)
    share = -np.expm1(-2 * path.length)  # of the state's variance that is drawn anew
    data = (path.data_weight * share)[:, None] * np.stack([1 + path.slope, -path.slope], axis=1)
    return from_data(path, data, path.kept * np.exp(-path.length), path.noise * np.sqrt(share))
