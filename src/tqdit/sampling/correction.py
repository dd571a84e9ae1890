"""What is known of a quantized network's errors along a chain, and how the loop takes them back.

This is PTQD (arXiv 2305.10657). An error D = eps^ - eps of the guided prediction at timestep t is taken to be
k eps + b_c + r: a part along eps, a bias of each channel, and noise r. The loop works with (eps^ - b_c) / (1 + k). What
is left of r, of standard deviation sigma_q, enters the next state as c sigma_q, c the weight of the prediction in the
step: a step that draws noise anyway draws that much less, sigma'^2 = max(0, sigma^2 - c^2 sigma_q^2).
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

from tqdit.errors import UsageError
from tqdit.sampling.process import Float64
from tqdit.sampling.schedule import Schedule

Float32 = NDArray[np.float32]
GAIN, REDUCED, BIAS = range(3)  # columns of `Correction.of`; those from BIAS on are of the channels
MOST = 1e6  # of any number; what is computed with them then fits into float32


class Correction(msgspec.Struct, frozen=True):
    """Errors of a quantized network at the timesteps of the chain that they were measured on, T of them, ascending.

    slope: k >= 0, (T,); bias: b, (T, C); deviation: sigma_q, (T,). They hold for that chain's guidance scale alone.
    """

    timesteps: tuple[float, ...]
    guidance_scale: float
    slope: tuple[float, ...]
    bias: tuple[tuple[float, ...], ...]
    deviation: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = [self.guidance_scale, *self.timesteps, *self.slope, *self.deviation]
        numbers += [value for row in self.bias for value in row]
        steps = len(self.timesteps)
        lengths = {steps, len(self.slope), len(self.bias), len(self.deviation)}
        channels = {len(row) for row in self.bias}
        ascending = sorted(set(self.timesteps)) == [*self.timesteps]
        small = all(abs(number) <= MOST for number in numbers)  # which NaN is not
        if not steps or len(lengths) > 1 or len(channels) > 1 or not ascending or not small:
            raise ValueError(
                f"a correction at {steps} timesteps; expected as many numbers, at most {MOST:g}, timesteps ascending"
            )
        if min(*self.slope, *self.deviation) < 0:
            raise ValueError("a correction with slopes or deviations below 0")

    def __str__(self) -> str:
        """'at guidance scale 1.5, from errors at 250 timesteps'."""
        return f"at guidance scale {self.guidance_scale:g}, from errors at {len(self.timesteps)} timesteps"

    def check_channels(self, channels: int) -> None:
        """Raises UsageError if it belongs to another state."""
        if len(self.bias[0]) != channels:
            raise UsageError(
                f"the correction has biases of {len(self.bias[0])} channels, the state has {channels}. Calibrate again."
            )

    def of(self, schedule: Schedule, scale: float) -> Float32 | None:
        """1 / (1 + k), c^2 sigma_q^2 and b of each step of a chain, (T, 2 + C); None for another guidance scale.

        Between the timesteps that were measured they are interpolated. Steps without guidance are left alone.
        """
        if not math.isclose(scale, self.guidance_scale, rel_tol=1e-6):
            return None

        def at(values: Float64) -> Float64:
            found: Float64 = np.interp(schedule.timesteps, self.timesteps, values)
            return found

        variance = np.square(schedule.error_weights * at(np.array(self.deviation)))
        columns = [1 / (1 + at(np.array(self.slope))), variance, *map(at, np.array(self.bias).T)]
        rows: Float32 = np.stack(columns, axis=1).astype(np.float32)
        if schedule.guided is not None:
            rows[~schedule.guided] = nothing(len(self.bias[0]))
        return rows


def nothing(channels: int) -> Float32:
    """A row of `Correction.of` that changes no bit, (2 + C,)."""
    row = np.zeros(2 + channels, np.float32)
    row[GAIN] = 1
    return row
