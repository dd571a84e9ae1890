"""Noise that depends on nothing but (seed, image, step).

Philox4x64-10 (Salmon et al., SC'11), a counter-based generator: the key is (seed, image), the counter starts at
(0, 0, draw, 0), where draw 0 is the initial latent and draw step + 1 the noise of a step. Batches, neighbours,
backends, workers and the order of requests therefore cannot change it. The raw 64-bit stream is fixed by NumPy's
compatibility promise for bit generators; the normal numbers come from it by the Box-Muller transform in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import UsageError

INITIAL = -1  # the "step" of the initial latent


def normal(seed: int, image: int, step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal float32 numbers of `shape` for one image at one step; step INITIAL gives x_T.

    seed and image are in 0..2^64-1, step in -1..2^63-1.
    """
    if not (0 <= seed < 2**64 and 0 <= image < 2**64):
        raise UsageError(f"seed {seed}, image {image}: both must lie in 0..2^64-1.")
    count = math.prod(shape)
    pairs = (count + 1) // 2
    bits = np.random.Philox(counter=[0, 0, step + 1, 0], key=[seed, image]).random_raw(2 * pairs)
    uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53  # 53 bits, in the open interval (0, 1)
    radius = np.sqrt(-2 * np.log(uniform[:pairs]))
    angle = 2 * np.pi * uniform[pairs:]
    values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return values.reshape(shape).astype(np.float32)


def normal_rows(
    seed: int, images: Sequence[int] | NDArray[np.int64], step: int, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """`normal` for several images, stacked: (len(images), *shape)."""
    return np.stack([normal(seed, int(image), step, shape) for image in images])
