"""TimeGroupSelect in Triton: counts the boundaries up to each row's timestep and copies the table's entry."""

import triton
import triton.language as tl


@triton.jit
def time_group_select_kernel(
    timestep, boundaries, table, elements, size, out, BOUNDARIES: tl.constexpr, BLOCK: tl.constexpr
):
    """out (rows, size) with rows * size = elements; table (BOUNDARIES + 1, size); timestep and boundaries int64
    or float32.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    t = tl.load(timestep + index // size, mask=inside, other=0)
    group = tl.zeros([BLOCK], tl.int64)
    for i in range(BOUNDARIES):
        group += (t >= tl.load(boundaries + i)).to(tl.int64)
    tl.store(out + index, tl.load(table + group * size + index % size, mask=inside), mask=inside)
