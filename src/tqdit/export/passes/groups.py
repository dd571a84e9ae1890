"""Values that follow each row's group of timesteps."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tqdit.export.passes.emit import Emitter
from tqdit.plugins.time_group_select.schema import OP_TYPE
from tqdit.quantization.table import factor_steps


class RowGroups:
    """Selects entries of per-group tables for the rows of one graph."""

    def __init__(self, timestep: ir.Value, boundaries: NDArray[np.int64]) -> None:
        self.timestep, self.boundaries = timestep, boundaries
        self._selected: dict[str, ir.Value] = {}

    def select(self, emit: Emitter, name: str, table: NDArray[np.float32], rank: int) -> ir.Value:
        """The entry of `table` (G,) for each row, shaped (B, 1, ..., 1) with `rank` dimensions."""
        full_name = f"{emit.scope}.{name}"
        if full_name not in self._selected:  # what divides an input multiplies the output again
            boundaries = Emitter(emit.graph, emit.before, "").constant("time_group_boundaries", self.boundaries)
            entries = emit.constant(name, table.reshape(-1, *[1] * (rank - 1)))
            self._selected[full_name] = emit.custom(OP_TYPE, self.timestep, boundaries, entries)
        return self._selected[full_name]


class Step:
    """A step s[g] = s_ref r[g], s_ref = max s[g]; with one scale r = 1 and is left out.

    Mirrors `tqdit.quantization.fake_quant.Step`, operation for operation.
    """

    def __init__(self, scale: NDArray[np.float32], groups: RowGroups) -> None:
        reference, self._ratio = factor_steps(scale)
        self.reference = np.float32(reference)
        self.grouped = scale.ndim == 1
        self._groups = groups

    def ratio(self, emit: Emitter, name: str, rank: int) -> ir.Value:
        return self._groups.select(emit, f"{name}.ratio", self._ratio, rank)

    def divide(self, emit: Emitter, x: ir.Value, name: str, rank: int) -> ir.Value:
        return emit.op("Div", x, self.ratio(emit, name, rank)) if self.grouped else x

    def multiply(self, emit: Emitter, y: ir.Value, name: str, rank: int) -> ir.Value:
        return emit.op("Mul", y, self.ratio(emit, name, rank)) if self.grouped else y
