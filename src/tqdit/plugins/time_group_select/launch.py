"""Block shape and launch arithmetic of the TimeGroupSelect kernel."""

from __future__ import annotations

from tqdit.plugins.kernels import Kernel, Launch, Size, ceil_div

BLOCK = 128


def kernel(table: str, boundaries: int, time: str = "i64") -> Kernel:
    """For a table of the type `table` ('fp32', 'fp16', 'bf16') with boundaries + 1 entries.

    time: type of timesteps and boundaries, 'i64' or 'fp32'.
    """
    return Kernel(
        module="tqdit.plugins.time_group_select.kernel",
        function="time_group_select_kernel",
        parameters=(
            ("timestep", f"*{time}"),
            ("boundaries", f"*{time}"),
            ("table", f"*{table}"),
            ("elements", "i32"),
            ("size", "i32"),
            ("out", f"*{table}"),
        ),
        constants=(("BOUNDARIES", boundaries), ("BLOCK", BLOCK)),
        num_warps=1,
    )


def launch(rows: Size, size: Size) -> Launch:
    """timestep (rows,), table (groups, ...) with `size` elements per entry."""
    elements = rows * size
    return Launch(ceil_div(elements, BLOCK), (elements, size))
