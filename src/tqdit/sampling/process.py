"""Processes: how a network was trained to turn noise into data, and which timesteps a chain of T steps visits.

A *timestep* is what the network is told, in its own unit. Steps of a chain are counted T-1..0; step 0 is the cleanest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from tqdit.bounds import check_count
from tqdit.errors import UsageError

Float64 = NDArray[np.float64]
Sign = Literal[1, -1]
TRAINING_STEPS = 1000
SPACINGS = ("linspace", "leading")
NO_CHAIN = (
    "the network's calls were recorded without a pipeline, so nothing tells how it is sampled. Use DropIn in a "
    "pipeline, or Denoiser with a loop of your own; or record a pipeline."
)
BETA_SCHEDULES: dict[str, Callable[[float, float], Float64]] = {
    "linear": lambda start, end: np.linspace(start, end, TRAINING_STEPS),
    "scaled_linear": lambda start, end: np.linspace(start**0.5, end**0.5, TRAINING_STEPS) ** 2,
}


class Diffusion(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="diffusion"):
    """DDPM (arXiv 2006.11239): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t in 0..999; the network predicts eps."""

    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    spacing: Literal["linspace", "leading"] = "linspace"  # round(linspace(0, 999, T)), or multiples of 1000 // T
    steps_offset: int = 0  # added to every timestep of the leading spacing
    learned_variance: bool = False  # the prediction's other channels are improved DDPM's fraction (2102.09672, eq. 15)

    def __post_init__(self) -> None:
        if self.spacing not in SPACINGS:
            raise UsageError(f"unknown timestep spacing '{self.spacing}'; known are {', '.join(SPACINGS)}.")
        if self.beta_schedule not in BETA_SCHEDULES:
            raise UsageError(f"unknown beta schedule '{self.beta_schedule}'; known are {', '.join(BETA_SCHEDULES)}.")
        if not 0 <= self.steps_offset < TRAINING_STEPS or not 0 < self.beta_start <= self.beta_end < 1:
            raise UsageError(
                f"betas from {self.beta_start} to {self.beta_end} with steps_offset {self.steps_offset}; expected "
                "0 < beta_start <= beta_end < 1 and an offset of 0 to 999."
            )

    @property
    def span(self) -> tuple[float, float]:
        """Timesteps lie in span[0] <= t < span[1]."""
        return 0, TRAINING_STEPS

    @property
    def noising(self) -> Diffusion:
        """Itself: how states are noised is known."""
        return self

    @property
    def alphas_cumprod(self) -> Float64:
        """abar_t of the training chain, (1000,)."""
        return np.cumprod(1 - BETA_SCHEDULES[self.beta_schedule](self.beta_start, self.beta_end), dtype=np.float64)

    def timesteps(self, steps: int) -> Float64:
        """The timesteps of a chain of T steps, ascending, (T,).

        `linspace` is DiT's own (improved DDPM's fractional stride), `leading` that of diffusers' DDIMScheduler.
        """
        check_count("steps", steps, 1, TRAINING_STEPS)
        if self.spacing == "linspace":
            return np.asarray(np.round(np.linspace(0, TRAINING_STEPS - 1, steps)), np.float64)
        found = np.arange(steps, dtype=np.float64) * (TRAINING_STEPS // steps) + self.steps_offset
        if found[-1] >= TRAINING_STEPS:
            raise UsageError(
                f"the chain's last timestep is {found[-1]:g}, beyond {TRAINING_STEPS - 1}: the offset of the "
                f"spacing is too large for {steps} steps. Pass fewer steps."
            )
        return found

    def noisy_timesteps(self, steps: int) -> Float64:
        """The timesteps of a chain whose last step goes to the data: those of T + 1 steps but the lowest, (T,)."""
        check_count("steps", steps, 1, TRAINING_STEPS - 1)
        return self.timesteps(steps + 1)[1:]

    def clean(self, timesteps: Float64) -> tuple[Float64, Float64]:
        """(p, q) of x_0 = p x_t + q prediction at each timestep."""
        a, b = self.mix(timesteps)
        return 1 / a, -b / a

    def mix(self, timesteps: Float64) -> tuple[Float64, Float64]:
        """(a, b) of x_t = a x_0 + b noise at each timestep."""
        abar = self.alphas_cumprod[np.asarray(timesteps, np.int64)]
        return np.sqrt(abar), np.sqrt(1 - abar)

    def target(self, x0: Float64, noise: Float64) -> Float64:  # noqa: ARG002 (as its sibling)
        """What the network learned to predict."""
        return noise


class Flow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="flow"):
    """Rectified flow (arXiv 2209.03003): x_t = (1 - t) x_0 + t noise, t in 0..1.

    The network is told time_scale t and predicts sign (noise - x_0). A chain visits t = shift u / (1 + (shift - 1) u)
    at even u (SD3, 2403.03206, section 5.3.2).
    """

    time_scale: float = 1000.0
    shift: float = 1.0
    sign: Sign = 1

    def __post_init__(self) -> None:
        if not 0 < self.time_scale <= 1e6 or not 0 < self.shift <= 100:
            raise UsageError(f"time scale {self.time_scale} with shift {self.shift}; expected numbers above 0.")

    @property
    def span(self) -> tuple[float, float]:
        """Timesteps lie in span[0] < t <= span[1]."""
        return 0.0, self.time_scale

    @property
    def noising(self) -> Flow:
        """Itself: how states are noised is known."""
        return self

    def timesteps(self, steps: int) -> Float64:
        """The timesteps of a chain of T steps, ascending, (T,); the last step ends at t = 0."""
        check_count("steps", steps, 1, TRAINING_STEPS)
        u = np.arange(1, steps + 1) / steps
        return self.time_scale * self.shift * u / (1 + (self.shift - 1) * u)

    noisy_timesteps = timesteps  # none of them is 0

    def clean(self, timesteps: Float64) -> tuple[Float64, Float64]:
        """(p, q) of x_0 = p x_t + q prediction at each timestep."""
        _, t = self.mix(timesteps)
        return np.ones_like(t), -self.sign * t

    def mix(self, timesteps: Float64) -> tuple[Float64, Float64]:
        """(a, b) of x_t = a x_0 + b noise at each timestep."""
        t = np.asarray(timesteps, np.float64) / self.time_scale
        return 1 - t, t

    def target(self, x0: Float64, noise: Float64) -> Float64:
        """What the network learned to predict."""
        return self.sign * (noise - x0)


class Table(msgspec.Struct, frozen=True):
    """A chain as recorded: the arrays of `schedule.Schedule`, indexed by the step. timesteps: the scheduler's own."""

    timesteps: tuple[float, ...]
    input_scale: tuple[float, ...]
    state_weights: tuple[tuple[float, ...], ...]
    output_weights: tuple[tuple[float, ...], ...]
    noise_weight: tuple[float, ...]
    initial_scale: float


class Recorded(msgspec.Struct, frozen=True, tag="recorded"):
    """A process of which chains were recorded, one table for each number of steps.

    The network is told time_scale t + time_shift for the table's timestep t, and the table's scheduler takes `sign`
    times its prediction. noising: how the states were noised, if the table tells; then other samplers fit, too.
    """

    scheduler: str  # name of the class, for messages
    tables: tuple[Table, ...]
    time_scale: float = 1.0
    time_shift: float = 0.0
    sign: Sign = 1
    training_steps: int = TRAINING_STEPS
    noising: Diffusion | Flow | None = None

    def __post_init__(self) -> None:
        if not self.time_scale or self.training_steps < 1:
            raise UsageError(
                f"timesteps {self.time_scale} t + {self.time_shift} of {self.training_steps} training steps; expected "
                "a factor other than 0, and at least 1 step."
            )

    @property
    def span(self) -> tuple[float, float]:
        """Timesteps lie in span[0] <= t <= span[1]."""
        ends = (self.time_shift, self.time_scale * self.training_steps + self.time_shift)
        return min(ends), max(ends)

    def table(self, steps: int) -> Table:
        """The table of T steps. Raises UsageError if none was recorded."""
        for table in self.tables:
            if len(table.timesteps) == steps:
                return table
        known = ", ".join(str(len(table.timesteps)) for table in self.tables)
        others = "" if self.noising is None else "a sampler such as dpm++2m or unipc, "
        raise UsageError(
            f"steps is {steps}; chains of {self.scheduler} were recorded with {known} steps. Pass one of these, "
            f"{others}or record a chain of that length."
        )

    def timesteps(self, steps: int) -> Float64:
        """What the network is told in the recorded chain of T steps, (T,)."""
        return self.time_scale * np.array(self.table(steps).timesteps) + self.time_shift

    def mix(self, timesteps: Float64) -> tuple[Float64, Float64]:
        """(a, b) of x_t = a x_0 + b noise at each timestep. Raises UsageError if the recording does not tell."""
        return self._known().mix(timesteps)

    def target(self, x0: Float64, noise: Float64) -> Float64:
        """What the network learned to predict. Raises UsageError, as `mix`."""
        return self._known().target(x0, noise)

    def _known(self) -> Diffusion | Flow:
        if self.noising is None:
            raise UsageError(f"how data was noised for {self.scheduler} is not known. Calibrate on recorded rows.")
        return self.noising


class Unsampled(msgspec.Struct, frozen=True, tag="unsampled"):
    """Nothing is known of how the network is sampled: its calls alone were recorded."""

    @property
    def noising(self) -> None:
        return None

    @property
    def span(self) -> tuple[float, float]:
        """Any timestep."""
        return -np.inf, np.inf

    def mix(self, timesteps: Float64) -> tuple[Float64, Float64]:  # noqa: ARG002 (as its siblings)
        """Raises UsageError."""
        raise UsageError(NO_CHAIN)

    def target(self, x0: Float64, noise: Float64) -> Float64:  # noqa: ARG002
        """Raises UsageError."""
        raise UsageError(NO_CHAIN)


Process = Diffusion | Flow | Recorded | Unsampled


def check_timesteps(process: Process, timesteps: Sequence[float], steps: int) -> None:
    """Refuse timesteps that a chain of T steps cannot visit, ascending."""
    least, most = process.span
    whole = isinstance(process.noising, Diffusion)
    inside = [t >= least and t < most and float(t).is_integer() if whole else least < t <= most for t in timesteps]
    if len(timesteps) != steps or not all(inside) or any(a >= b for a, b in pairwise(timesteps)):
        numbers = f"whole numbers from {least:g} to {most - 1:g}" if whole else f"above {least:g}, at most {most:g}"
        found = ", ".join(f"{t:g}" for t in timesteps[:8]) + ", ..." * (len(timesteps) > 8)
        raise UsageError(f"timesteps {found} of a chain of {steps} steps; expected {steps} ascending ones, {numbers}.")
