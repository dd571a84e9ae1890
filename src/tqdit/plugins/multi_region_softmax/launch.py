"""Block shapes and launch arithmetic of the kernels of MultiRegionSoftmax and MultiRegionNumerator."""

from __future__ import annotations

from tqdit.errors import UsageError
from tqdit.plugins.kernels import MAX_TOKENS, Kernel, Launch, Size, ceil_div, next_power_of_two, top_code

TILE = 4096  # elements that one program holds in registers; a longer row passes through them in tiles


def kernel(scores: str, columns: int, bits: int, high_scale: float, numerators: bool = False) -> Kernel:
    """For scores and result of the type `scores` ('fp32', 'fp16', 'bf16') with `columns` keys.

    numerators: MultiRegionNumerator, which has the reciprocals of the sums as a second result.

    Raises UsageError beyond `MAX_TOKENS` keys.
    """
    if not 1 <= columns <= MAX_TOKENS:
        name = "MultiRegionNumerator" if numerators else "MultiRegionSoftmax"
        raise UsageError(f"{name} over {columns} tokens: its kernel takes 1..{MAX_TOKENS}. "
                         "Build with --no-plugins.")  # fmt: skip
    width = min(TILE, next_power_of_two(columns))
    return Kernel(
        module="tqdit.plugins.multi_region_softmax.kernel",
        function=f"multi_region_{'numerator' if numerators else 'softmax'}_kernel",
        parameters=(
            ("scores", f"*{scores}"),
            ("low_scale", "*fp32"),
            ("rows", "i32"),
            ("rows_per_image", "i32"),
            ("low_scales", "i32"),
            ("out", f"*{scores}"),
            *((("reciprocals", "*fp32"),) if numerators else ()),
        ),
        constants=(
            ("COLUMNS", columns),
            ("TOP", top_code(bits)),
            ("HIGH_STEP", high_scale),
            ("BLOCK_ROWS", max(1, min(16, TILE // 2 // width))),
            ("BLOCK_COLUMNS", width),
        ),
        num_warps=4 if width <= 2048 else 8,
    )


def launch(kernel: Kernel, images: Size, heads: Size, queries: Size, low_scales: Size) -> Launch:
    """scores (images, heads, queries, columns), low_scale (low_scales,)."""
    rows = images * heads * queries
    return Launch(ceil_div(rows, int(dict(kernel.constants)["BLOCK_ROWS"])), (rows, heads * queries, low_scales))
