"""DPM-Solver++ of second order with two steps (arXiv 2211.01095, algorithm 2); its last step is of first order."""

from __future__ import annotations

import numpy as np

from tqdit.sampling.process import Diffusion, Float64, Flow
from tqdit.sampling.schedule import Schedule
from tqdit.sampling.solver import from_data, noisy_timesteps, path_of

NAME = "dpm++2m"
PROCESS = Diffusion | Flow
visits = noisy_timesteps


def schedule(process: Diffusion | Flow, timesteps: Float64) -> Schedule:
    path = path_of(process, timesteps)
    return from_data(path, path.gain[:, None] * np.stack([1 + path.slope, -path.slope], axis=1))
