"""Heun's method (EDM, arXiv 2206.00364, algorithm 1). A step is a network call, and most intervals take two.

Along x / a of a diffusion, whose slope over b / a is the predicted noise, or along x of a flow, whose slope is the
prediction with the flow's sign. T calls make T // 2 + 1 intervals; the last one, and the one before if T is even, takes
one call (Euler).
"""

from __future__ import annotations

import numpy as np

from tqdit.errors import UsageError
from tqdit.sampling.process import Diffusion, Float64, Flow
from tqdit.sampling.schedule import Schedule

PROCESS = Diffusion | Flow


def visits(process: Diffusion | Flow, steps: int) -> Float64:
    return _calls(process.noisy_timesteps(steps // 2 + 1), steps)


def schedule(process: Diffusion | Flow, timesteps: Float64) -> Schedule:
    steps, places = len(timesteps), np.unique(timesteps)
    if not np.array_equal(timesteps, _calls(places, steps)):
        raise UsageError("'heun' calls the network twice at most timesteps, so its steps cannot be placed.")
    a, b = process.mix(places)
    a, b = np.append(1.0, a), np.append(0.0, b)
    unit, place = (a, b / a) if isinstance(process, Diffusion) else (np.ones_like(a), process.sign * b)
    visited, states, outputs = [], [], []
    calls = steps
    for start in range(len(places), 0, -1):  # an interval from place[start] to place[start - 1]
        kept, gain = unit[start - 1] / unit[start], unit[start - 1] * (place[start - 1] - place[start])
        visited.append(places[start - 1])
        states.append((kept, 0.0))
        outputs.append((gain, 0.0))
        if calls >= 2 * start - 1 and start > 1:
            visited.append(places[start - 2])  # the state here is the guess of the call before
            states.append((0.0, kept))
            outputs.append((gain / 2, gain / 2))
        calls = steps - len(visited)
    order = slice(None, None, -1)
    return Schedule(
        np.array(visited)[order], np.array(states)[order], np.array(outputs)[order], np.zeros(steps), np.ones(steps)
    )


def _calls(places: Float64, steps: int) -> Float64:
    """The timesteps of T calls by the T // 2 + 1 ends of the intervals, both ascending."""
    counts = np.full(len(places), 2)
    counts[-1] = 1  # the first interval begins there
    counts[0] = 1 if steps % 2 == 0 else counts[0]
    return np.repeat(places, counts)
