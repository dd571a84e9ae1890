"""The scheduler of a recorded pipeline, as a table."""

from __future__ import annotations

import numpy as np

from tqdit.errors import UsageError
from tqdit.sampling.process import Float64, Recorded
from tqdit.sampling.schedule import Schedule

PROCESS = Recorded


def schedule(process: Recorded, timesteps: Float64) -> Schedule:
    """x' of the recorded chain, which the network's prediction enters with the pipeline's sign."""
    table = process.table(len(timesteps))
    if not np.array_equal(timesteps, process.timesteps(len(timesteps))):
        raise UsageError(
            f"steps of {process.scheduler} lie where they were recorded, and cannot be placed. Pass a number of steps."
        )
    return Schedule(
        timesteps=timesteps,
        state_weights=np.array(table.state_weights),
        output_weights=process.sign * np.array(table.output_weights),
        noise_weight=np.array(table.noise_weight),
        input_scale=np.array(table.input_scale),
        initial_scale=table.initial_scale,
    )
