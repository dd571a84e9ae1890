"""Values that follow each row's group of timesteps."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tqdit.exporter.passes.emit import Emitter
from tqdit.plugins.time_group_select.schema import OP_TYPE


class GroupSelector:
    """Selects entries of per-group tables for the rows of one graph. boundaries float64 (G - 1,)."""

    def __init__(self, timestep: ir.Value, boundaries: NDArray[np.float64]) -> None:
        self.timestep = timestep
        self.boundaries = in_type(boundaries, np.dtype(np.int64 if timestep.dtype == ir.DataType.INT64 else np.float32))
        self._selected: dict[str, dict[int, ir.Value]] = {}  # by name and rank

    def select(self, emit: Emitter, name: str, table: NDArray[np.float32], rank: int) -> ir.Value:
        """The entry of `table` (G,) for each row, shaped (B, 1, ..., 1) with `rank` dimensions."""
        selected = self._selected.setdefault(f"{emit.scope}.{name}", {})
        if rank not in selected:  # what divides an input multiplies the output again
            boundaries = Emitter(emit.graph, emit.before, "").constant("time_group_boundaries", self.boundaries)
            entries = emit.constant(f"{name}.{rank}" if selected else name, table.reshape(-1, *[1] * (rank - 1)))
            (selected[rank],) = emit.custom(OP_TYPE, self.timestep, boundaries, entries)
        return selected[rank]


def in_type(boundaries: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The least value of `dtype`, int64 or float32, that is not below each boundary: t >= b stays the same."""
    if dtype == np.int64:
        return np.ceil(boundaries).astype(np.int64)
    near = boundaries.astype(np.float32)
    return np.where(near < boundaries, np.nextafter(near, np.float32(np.inf)), near)
