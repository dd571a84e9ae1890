"""Euler's method along a rectified flow (arXiv 2209.03003)."""

from __future__ import annotations

import numpy as np

from tqdit.sampling.process import Flow
from tqdit.sampling.schedule import Schedule, single_step

PROCESS = Flow


def schedule(process: Flow, steps: int) -> Schedule:
    """x' = x + (t' - t) velocity."""
    timesteps = process.timesteps(steps)
    t = timesteps / process.time_scale
    return single_step(timesteps, np.ones(steps), np.append(0.0, t[:-1]) - t)
