"""A diffusers scheduler as a table: each of its steps, run on random vectors, is fitted by least squares.

Every update that is linear in the states, the network's predictions and the noise of at most three steps before has
such a table; clipping, thresholding and a learned variance do not.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqdit.errors import UsageError, first_line
from tqdit.models.calls import DROP_IN_ONLY
from tqdit.sampling.process import BETA_SCHEDULES, TRAINING_STEPS, Diffusion, Flow, Sign, Table
from tqdit.sampling.schedule import MOST_LAG

ELEMENTS = 512  # of the vectors that a step is fitted on
RESIDUAL = 2e-5  # of a fit, relative: schedulers compute in float32, and cancel in short chains
TOLERANCE = 2e-6  # smaller weights are none
NEAR = 1e-2  # of the data and the noise in a state: some schedulers of flows tell the network whole numbers for 1000 t
Float64 = NDArray[np.float64]


def tabulate(scheduler: Any) -> Table:
    """The table of a scheduler whose timesteps are set, which stays as it is.

    Raises UsageError, naming the residual, for a scheduler whose update is not linear.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.__dict__.pop("step", None)  # a recorder's
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(1, 1, 1, ELEMENTS, generator=generator)

    timesteps = [float(t) for t in scheduler.timesteps]
    initial = float(getattr(scheduler, "init_noise_sigma", 1.0))
    x = draw() * initial
    states: list[Tensor] = []
    outputs: list[Tensor] = []
    rows: list[tuple[float, Float64, Float64, float]] = []  # input scale, weights of states and outputs, of noise
    with _noise_from(scheduler, draw) as drawn:
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            input_scale = float((scaled * x).sum() / (x * x).sum())
            output = draw()
            states, outputs = [x, *states][: MOST_LAG + 1], [output, *outputs][: MOST_LAG + 1]
            drawn.clear()
            x = _step(scheduler, output, timestep, x)
            rows.append((input_scale, *_fit(x, states, outputs, drawn, type(scheduler).__name__)))
    lag = max(len(row[1]) for row in rows) - 1
    return Table(
        timesteps=tuple(timesteps[::-1]),
        input_scale=tuple(row[0] for row in rows[::-1]),
        state_weights=tuple(tuple(np.pad(row[1], (0, lag + 1 - len(row[1]))).tolist()) for row in rows[::-1]),
        output_weights=tuple(tuple(np.pad(row[2], (0, lag + 1 - len(row[2]))).tolist()) for row in rows[::-1]),
        noise_weight=tuple(row[3] for row in rows[::-1]),
        initial_scale=initial,
    )


def find_noising(
    config: Mapping[str, Any], table: Table, time: tuple[float, float], sign: Sign
) -> Diffusion | Flow | None:
    """How the states of a recorded chain were noised, None if no process that is known explains its table.

    config: the scheduler's settings. time: factor and shift of what the network is told for the table's timesteps.
    sign: of the prediction.
    """
    scale, shift = time
    told = scale * np.array(table.timesteps)
    scaled = table.initial_scale != 1 or set(table.input_scale) != {1.0}
    if shift or scale <= 0 or scaled or any(table.noise_weight) or len(told) < 2:
        return None
    if np.any(np.diff(told) <= 0) or told[0] < 0:
        return None
    t = told / (scale * TRAINING_STEPS)
    candidates: list[Diffusion | Flow] = []
    if 0 < t[0] < t[-1] <= 1:
        candidates.append(Flow(scale * TRAINING_STEPS, _shift_of(config, t), sign))
    if config.get("beta_schedule") in BETA_SCHEDULES and t[-1] < 1 and scale == sign == 1 and not np.any(told % 1):
        candidates.append(Diffusion(config["beta_schedule"], config["beta_start"], config["beta_end"]))
    return next((each for each in candidates if _explains(table, each, told, sign)), None)


def _shift_of(config: Mapping[str, Any], t: Float64) -> float:
    """The scheduler's shift; if it depends on the size of the image, the one with which even u make the times t."""
    given = config.get("flow_shift" if config.get("use_flow_sigmas") else "shift")
    if isinstance(given, int | float) and 0 < given <= 100 and not config.get("use_dynamic_shifting"):
        return float(given)
    u = np.arange(1, len(t) + 1) / len(t)
    inside = (u < 1) & (t < 1)
    ratios = t[inside] * (1 - u[inside]) / (u[inside] * (1 - t[inside]))
    return float(np.clip(np.median(ratios), 1e-3, 100)) if len(ratios) else 1.0


def _explains(table: Table, process: Diffusion | Flow, told: Float64, sign: Sign) -> bool:
    """Whether a chain with a perfect network stays on the way of this process up to its last step.

    A state is a x_0 + b noise, here (a, b), and the network predicts the process's target at each of them. Where the
    last step goes is the scheduler's own choice.
    """
    way = np.stack(process.mix(told), axis=1)  # (T, 2)
    prediction = sign * process.target(*np.eye(2))
    states = [way[-1]]
    for step in range(len(told) - 1, 0, -1):
        weights = zip(table.state_weights[step], table.output_weights[step], reversed(states), strict=False)
        states.append(sum((kept * x + gain * prediction for kept, gain, x in weights), np.zeros(2)))
        if np.abs(states[-1] - way[step - 1]).max() > NEAR:
            return False
    return True


def _step(scheduler: Any, output: Tensor, timestep: Any, x: Tensor) -> Tensor:
    try:
        after: Tensor = scheduler.step(output, timestep, x, return_dict=False)[0]
    except Exception as error:  # some take more than that, or look at what is in it
        raise UsageError(
            f"{type(scheduler).__name__} makes no step from a prediction, a timestep and a sample alone "
            f"({first_line(error)}). Record with another scheduler. {DROP_IN_ONLY}"
        ) from error
    return after


def _fit(
    x: Tensor, states: list[Tensor], outputs: list[Tensor], noise: list[Tensor], name: str
) -> tuple[Float64, Float64, float]:
    """Weights of the states and the outputs, the latest first, and of the noise, that make x: with the least lag."""
    y = x.flatten().double()
    residual = np.inf
    if not torch.isfinite(y).all():
        raise UsageError(f"{name}: a step of it is NaN or infinite. Record with another scheduler, or fewer steps.")
    for lag in range(len(states)):
        features = [*states[: lag + 1], *outputs[: lag + 1], *noise]
        matrix = torch.stack([feature.flatten().double() for feature in features], 1)
        weights = torch.linalg.lstsq(matrix, y[:, None], driver="gelsd").solution[:, 0]
        residual = float((matrix @ weights - y).norm() / y.norm())
        if residual < RESIDUAL:
            found = np.where(np.abs(weights.numpy()) < TOLERANCE, 0, weights.numpy())
            return found[: lag + 1], found[lag + 1 : 2 * lag + 2], float(found[-1]) if noise else 0.0
    raise UsageError(
        f"{name}: its update is not linear in the last {MOST_LAG + 1} steps (residual {residual:.1e}, expected less "
        f"than {RESIDUAL:.0e}). Record with another scheduler, without clip_sample and thresholding."
    )


@contextlib.contextmanager
def _noise_from(scheduler: Any, draw: Any) -> Iterator[list[Tensor]]:
    """Inside, the scheduler's noise is drawn by `draw` and listed."""
    module = sys.modules[type(scheduler).__module__]
    original = getattr(module, "randn_tensor", None)
    drawn: list[Tensor] = []

    def randn_tensor(shape: Any, *_: Any, **__: Any) -> Tensor:
        noise: Tensor = draw()
        assert tuple(noise.shape) == tuple(shape)
        drawn.append(noise)
        return noise

    if original is not None:
        module.randn_tensor = randn_tensor  # type: ignore[attr-defined]
    try:
        yield drawn
    finally:
        if original is not None:
            module.randn_tensor = original  # type: ignore[attr-defined]
