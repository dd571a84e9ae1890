"""DEIS of second order (tAB-DEIS over log(b / a), arXiv 2204.13902); its first and last steps are of first order.

The predicted noise is extrapolated along a line in log(b / a) from its last two values, and integrated exactly.
"""

from __future__ import annotations

import numpy as np

from tqdit.sampling.process import Diffusion, Float64
from tqdit.sampling.schedule import Schedule

PROCESS = Diffusion
visits = Diffusion.noisy_timesteps


def schedule(process: Diffusion, timesteps: Float64) -> Schedule:
    """x' / a' = x / a + the integral of the line over b / a."""
    steps = len(timesteps)
    a, b = process.mix(timesteps)
    after = np.append(1.0, a[:-1])
    weights = np.zeros((steps, 2))
    weights[:, 0] = after * (np.append(0.0, (b / a)[:-1]) - b / a)
    for step in range(1, steps - 1):
        end, here, before = (b / a)[step - 1 : step + 2]
        # The integral of (log r - log here) over r from here to end, by the distance of the two places of the line.
        share = (end * (np.log(end / here) - 1) + here) / np.log(before / here)
        weights[step, 0] += after[step] * -share
        weights[step, 1] = after[step] * share
    states = np.stack([after / a, np.zeros(steps)], axis=1)
    return Schedule(timesteps, states, weights, np.zeros(steps), np.ones(steps))
