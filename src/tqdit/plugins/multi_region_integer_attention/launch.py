"""Block shapes and launch arithmetic of the kernel of MultiRegionIntegerAttention and its form of numerators."""

from __future__ import annotations

from tqdit.errors import UsageError
from tqdit.plugins.kernels import MAX_TOKENS, Kernel, Launch, Size, ceil_div, next_power_of_two
from tqdit.plugins.multi_region_attention.launch import MAX_HEAD, Blocks, shared_constants, split_head

MAX_KEYS = 1 << 17  # 127 * 128 of each still sum up in int32
LEAST_SUM = 32  # columns or keys that an 8-bit product sums at once
OUT_TYPES = {1: "fp32", 10: "fp16", 16: "bf16", 3: "i8"}  # ONNX's number of a result's type -> Triton's name


def summed_split(main: int, rest: int) -> tuple[int, int]:
    """(main, rest) of a head where its columns are summed, from those of `split_head`."""
    if main < LEAST_SUM:
        return LEAST_SUM, 0
    return main, max(LEAST_SUM, rest) if rest else 0


def candidates(head: int, keys: int, large: bool = False) -> tuple[Blocks, ...]:
    """Block shapes worth trying, the default first, under the conditions of `multi_region_attention.launch.candidates`.

    Two sums of int32 in the place of one of float32 take more registers, tiles of int8 half of the shared memory.
    """
    columns, half = sum(split_head(head)), max(LEAST_SUM, next_power_of_two(keys) // 2)
    if keys <= 64:
        return (Blocks(64, half, 4, 1),)
    small = (Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2))
    if keys <= 256:
        return (Blocks(64, half, 4, 1), Blocks(128, half, 8, 1), *small)
    more = (Blocks(128, 128, 8, 2),) if large else ()
    return (Blocks(128, 64, 8, 2 if columns <= 80 else 1), *small, *more)


def kernel(
    out: str, queries: int, keys: int, head: int, bits: int, high_scale: float,
    blocks: Blocks | None = None, mask: tuple[int, int, int] = (1, 1, 1), numerators: bool = False,
) -> Kernel:  # fmt: skip
    """For a result of the type `out` ('fp32', 'fp16', 'bf16', 'i8') with heads of `head` columns.

    mask, numerators: as for `multi_region_attention.launch.kernel`. Raises UsageError for sizes that the kernel does
    not take.
    """
    name = "MultiRegionNumeratorIntegerAttention" if numerators else "MultiRegionIntegerAttention"
    if not (1 <= head <= MAX_HEAD and 1 <= keys <= MAX_KEYS and 1 <= queries <= MAX_TOKENS):
        raise UsageError(f"{name} with heads of {head} over {queries} x {keys} tokens: its kernel takes "
                         f"1..{MAX_HEAD} and 1..{MAX_TOKENS} x 1..{MAX_KEYS}. Build with --no-plugins.")  # fmt: skip
    blocks = blocks or candidates(head, keys)[0]
    main, rest = split_head(head)
    summed_main, summed_rest = summed_split(main, rest)
    return Kernel(
        module="tqdit.plugins.multi_region_integer_attention.kernel",
        function="multi_region_integer_attention_kernel",
        parameters=(
            ("q", "*i8"),
            ("k", "*i8"),
            ("v", "*i8"),
            ("mask", "*fp32"),
            ("scale", "*fp32"),
            ("low_scale", "*fp32"),
            ("out_scale", "*fp32"),
            ("out_shift", "*fp32"),
            ("heads", "i32"),
            ("masks", "i32"),
            ("scales", "i32"),
            ("low_scales", "i32"),
            ("out_scales", "i32"),
            ("out_shifts", "i32"),
            ("out", f"*{out}"),
        ),
        constants=(
            *shared_constants(queries, keys, head, mask, bits, high_scale, numerators, blocks),
            ("SUMMED_MAIN", summed_main),
            ("SUMMED_REST", summed_rest),
        ),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def launch(
    kernel: Kernel, images: Size, heads: Size, masks: Size, scales: Size, low_scales: Size, out_scales: Size,
    out_shifts: Size,
) -> Launch:  # fmt: skip
    """q (images, heads, queries, head), mask (masks, ...), scale (scales,) and so on, each 1 or `images`."""
    constants = dict(kernel.constants)
    blocks = ceil_div(int(constants["QUERIES"]), int(constants["BLOCK_QUERIES"]))
    return Launch(images * heads * blocks, (heads, masks, scales, low_scales, out_scales, out_shifts))
