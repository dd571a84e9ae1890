"""TimeGroupSelect in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def time_group_select(timestep: NDArray[np.int64], boundaries: NDArray[np.int64], table: NDArray[Any]) -> NDArray[Any]:
    """timestep (B,), boundaries (G-1,) increasing, table (G, ...) -> (B, ...).

    The group of a row is the number of boundaries <= its timestep: a timestep on a boundary belongs to the later group.
    """
    group = (timestep[:, None] >= boundaries[None]).sum(axis=1)
    selected: NDArray[Any] = table[group]
    return selected
