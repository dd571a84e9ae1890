"""Block shapes and launch arithmetic of the kernel of MultiRegionAttention and MultiRegionNumeratorAttention."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from tqdit.errors import UsageError
from tqdit.plugins.kernels import MAX_TOKENS, Kernel, Launch, Size, ceil_div, next_power_of_two, top_code

MAX_HEAD = 128
SHARED_LIMIT = 48 * 1024  # bytes of dynamic shared memory that every launcher gives without asking


@dataclass(frozen=True)
class Blocks:
    """Queries of one program, keys of one tile, warps, and tiles in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


def split_head(head: int) -> tuple[int, int]:
    """(main, rest) columns of a head as powers of two of at least 16, the rest possibly 0: 72 is 64 + 16, not 128."""
    main = max(16, 1 << (head.bit_length() - 1))
    return main, 0 if head <= main else max(16, next_power_of_two(head - main))


def candidates(floats: str, head: int, keys: int, large: bool = False) -> tuple[Blocks, ...]:
    """Block shapes worth trying, the default first; TensorRT times each of them as a tactic.

    They take at most SHARED_LIMIT bytes of shared memory on every target. large: those that take more as well, for
    which a launcher must ask the driver; nobody has seen TensorRT do so. Up to 256 keys the first two keep the scores
    on chip. Not measured on a GPU yet: chosen by registers, spills and shared memory as the compiler reports them
    (docs/kernels.md).
    """
    half, columns = max(16, next_power_of_two(keys) // 2), sum(split_head(head))
    if floats == "fp32":
        return (*((Blocks(64, 32, 4, 1),) if large or columns <= 64 else ()), Blocks(32, 32, 4, 1))
    if keys <= 64:
        return (Blocks(64, half, 4, 1),)
    small = [Blocks(128, 32, 8, 2)] if columns <= 80 else []
    small += [Blocks(64, 64, 4, 1), Blocks(64, 32, 4, 2)]
    more: tuple[Blocks, ...] = ()
    if keys <= 256:
        wide = (Blocks(128, half, 8, 1),) if large or columns <= 96 else ()
        more = (Blocks(128, 64, 8, 2),) if large else ()
        return (Blocks(64, half, 4, 1), *wide, small[-1], *more)
    stages = 3 if columns <= 80 else 2
    if large:
        more = (Blocks(128, 64, 8, stages), Blocks(128, 128, 8, 2), Blocks(64, 64, 4, stages))
    return (Blocks(128, 64, 8, 1), *small, *more)


def kernel(
    floats: str, queries: int, keys: int, head: int, bits: int, high_scale: float,
    blocks: Blocks | None = None, mask: tuple[int, int, int] = (1, 1, 1), numerators: bool = False,
) -> Kernel:  # fmt: skip
    """For q, k, v and result of the type `floats` ('fp32', 'fp16', 'bf16') with heads of `head` columns.

    mask: its numbers of heads, queries and keys. With one key for all it changes no probability and is not read.
    numerators: round the numerators of the softmax and divide the result by their sum.

    Raises UsageError for sizes that the kernel does not take.
    """
    name = "MultiRegionNumeratorAttention" if numerators else "MultiRegionAttention"
    if not (1 <= head <= MAX_HEAD and 1 <= keys <= MAX_TOKENS and 1 <= queries <= MAX_TOKENS):
        raise UsageError(f"{name} with heads of {head} over {queries} x {keys} tokens: its kernel takes "
                         f"1..{MAX_HEAD} and 1..{MAX_TOKENS}. Build with --no-plugins.")  # fmt: skip
    blocks = blocks or candidates(floats, head, keys)[0]
    types = f"*{floats}"
    return Kernel(
        module="tqdit.plugins.multi_region_attention.kernel",
        function="multi_region_attention_kernel",
        parameters=(
            ("q", types),
            ("k", types),
            ("v", types),
            ("mask", "*fp32"),
            ("low_scale", "*fp32"),
            ("heads", "i32"),
            ("low_scales", "i32"),
            ("masks", "i32"),
            ("scale_bits", "i32"),
            ("out", types),
        ),
        constants=(
            *shared_constants(queries, keys, head, mask, bits, high_scale, numerators, blocks),
            ("PRECISION", "tf32x3" if floats == "fp32" else "tf32"),
        ),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def shared_constants(
    queries: int, keys: int, head: int, mask: tuple[int, int, int], bits: int, high_scale: float, numerators: bool,
    blocks: Blocks,
) -> tuple[tuple[str, int | float | str], ...]:  # fmt: skip
    """What the kernels of float and of integer attention are both told."""
    main, rest = split_head(head)
    return (
        ("QUERIES", queries),
        ("KEYS", keys),
        ("HEAD", head),
        ("MAIN", main),
        ("REST", rest),
        ("NUMERATORS", numerators),
        ("MASKED", mask[2] > 1),
        ("IMAGE_STRIDE", math.prod(mask)),
        ("HEAD_STRIDE", mask[1] * mask[2] if mask[0] > 1 else 0),
        ("QUERY_STRIDE", mask[2] if mask[1] > 1 else 0),
        ("TOP", top_code(bits)),
        ("HIGH_STEP", high_scale),
        # A probability of 1 has the code 1 / s2; only below it must codes be clipped.
        ("CLIP", round(1 / high_scale) > top_code(bits)),
        ("BLOCK_QUERIES", blocks.queries),
        ("BLOCK_KEYS", blocks.keys),
    )


def launch(kernel: Kernel, images: Size, heads: Size, low_scales: Size, scale: float, masks: Size = 1) -> Launch:
    """q (images, heads, queries, head), low_scale (low_scales,), mask (masks, ...).

    scale: of the scores, passed as the bits of a float32, so that layers that differ in it alone share a kernel.
    Raises UsageError unless it is positive.
    """
    if not 0 < scale < math.inf:
        raise UsageError(f"attention with scale {scale}: its kernel takes a positive one.")
    constants = dict(kernel.constants)
    blocks = ceil_div(int(constants["QUERIES"]), int(constants["BLOCK_QUERIES"]))
    (bits,) = struct.unpack("<i", struct.pack("<f", scale))
    return Launch(images * heads * blocks, (heads, low_scales, masks, bits))
