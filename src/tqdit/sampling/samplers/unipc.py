"""UniPC of second order (arXiv 2302.04867, B(h) = exp(h) - 1): each prediction also corrects its own state."""

from __future__ import annotations

import numpy as np

from tqdit.sampling.process import Diffusion, Float64, Flow
from tqdit.sampling.schedule import Schedule
from tqdit.sampling.solver import Path, from_data, noisy_timesteps, path_of

PROCESS = Diffusion | Flow
visits = noisy_timesteps


def schedule(process: Diffusion | Flow, timesteps: Float64) -> Schedule:
    """The predictor is DPM-Solver++'s step from the corrected state, which is the state plus a correction.

    So the corrected states need not be kept: x' = kept (x + correction) + predictor.
    """
    path = path_of(process, timesteps)
    data = path.kept[:, None] * _correction(path)
    data[:, :2] += path.gain[:, None] * np.stack([1 + path.slope, -path.slope], axis=1)
    return from_data(path, data)


def _correction(path: Path) -> Float64:
    """What the prediction at a state changes of it: weights (T, 3) of the predicted data, this one's first.

    UniC less UniP of the step that led to the state; both begin at the same corrected state.
    """
    found = np.zeros((len(path.length), 3))
    for step in range(len(path.length) - 1):
        came = step + 1  # the step that led here
        slope = path.slope[came]
        here, older = _corrector(path.length[came], -1 / (2 * slope)) if slope else (0.5, 0.0)
        before = slope - 2 * slope * older
        found[step] = path.gain[came] * np.array([here, -here - before, before])
    return found


def _corrector(h: float, ratio: float) -> tuple[float, float]:
    """The weights of the last and of the last but one change of the predicted data: R_p(h)^-1 phi_p(h) / B(h).

    ratio: of the step before to this one, negative. h > 0.
    """
    b = np.expm1(-h)
    first = b / -h - 1
    second = first / -h - 0.5
    last, here = np.linalg.solve(np.array([[1.0, 1.0], [ratio, 1.0]]), np.array([first, 2 * second]) / b)
    return float(here), float(last)
