"""TimeGroupSelect in NumPy."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray


def time_group_select(timestep: NDArray[Any], boundaries: NDArray[Any], table: NDArray[Any]) -> NDArray[Any]:
    """timestep (B,), boundaries (G-1,) increasing, both int64 or float32; table (G, ...) -> (B, ...).

    The group of a row is the number of boundaries <= its timestep: a timestep on a boundary belongs to the later group.
    """
    group = (timestep[:, None] >= boundaries[None]).sum(axis=1)
    selected: NDArray[Any] = table[group]
    return selected
