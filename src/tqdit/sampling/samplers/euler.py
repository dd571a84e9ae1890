"""Euler's method along a rectified flow (arXiv 2209.03003)."""

from __future__ import annotations

import numpy as np

from tqdit.sampling.process import Float64, Flow
from tqdit.sampling.schedule import Schedule, single_step

PROCESS = Flow


def schedule(process: Flow, timesteps: Float64) -> Schedule:
    """x' = x + (t' - t) velocity."""
    t = timesteps / process.time_scale
    return single_step(timesteps, np.ones_like(t), process.sign * (np.append(0.0, t[:-1]) - t))
