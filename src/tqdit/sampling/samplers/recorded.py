"""The scheduler of a recorded pipeline, as a table."""

from __future__ import annotations

import numpy as np

from tqdit.sampling.process import Recorded
from tqdit.sampling.schedule import Schedule

PROCESS = Recorded


def schedule(process: Recorded, steps: int) -> Schedule:
    """x' of the recorded chain, which the network's prediction enters with the pipeline's sign."""
    table = process.table(steps)
    return Schedule(
        timesteps=process.time_scale * np.array(table.timesteps) + process.time_shift,
        state_weights=np.array(table.state_weights),
        output_weights=process.sign * np.array(table.output_weights),
        noise_weight=np.array(table.noise_weight),
        input_scale=np.array(table.input_scale),
        initial_scale=table.initial_scale,
    )
