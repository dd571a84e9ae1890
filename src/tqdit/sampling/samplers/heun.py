"""Heun's method (EDM, arXiv 2206.00364, algorithm 1). A step is a network call, and most intervals take two.

Along x / a of a diffusion, whose slope over b / a is the predicted noise, or along x of a flow, whose slope is the
prediction. T calls make T // 2 + 1 intervals; the last one, and the one before if T is even, takes one call (Euler).
"""

from __future__ import annotations

import numpy as np

from tqdit.sampling.process import Diffusion, Flow
from tqdit.sampling.schedule import Schedule

PROCESS = Diffusion | Flow


def schedule(process: Diffusion | Flow, steps: int) -> Schedule:
    timesteps = process.noisy_timesteps(steps // 2 + 1)
    a, b = process.mix(timesteps)
    a, b = np.append(1.0, a), np.append(0.0, b)
    unit, place = (a, b / a) if isinstance(process, Diffusion) else (np.ones_like(a), b)
    visited, states, outputs = [], [], []
    calls = steps
    for start in range(len(timesteps), 0, -1):  # an interval from place[start] to place[start - 1]
        kept, gain = unit[start - 1] / unit[start], unit[start - 1] * (place[start - 1] - place[start])
        visited.append(timesteps[start - 1])
        states.append((kept, 0.0))
        outputs.append((gain, 0.0))
        if calls >= 2 * start - 1 and start > 1:
            visited.append(timesteps[start - 2])  # the state here is the guess of the call before
            states.append((0.0, kept))
            outputs.append((gain / 2, gain / 2))
        calls = steps - len(visited)
    order = slice(None, None, -1)
    return Schedule(
        np.array(visited)[order], np.array(states)[order], np.array(outputs)[order], np.zeros(steps), np.ones(steps)
    )
