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
    values = np.empty(shape, np.float32)
    Normals(shape).fill(values, seed, image, step)
    return values


def check_key(seed: int, image: int) -> None:
    """Refuse what the generator cannot take as its key."""
    if not (0 <= seed < 2**64 and 0 <= image < 2**64):
        raise UsageError(f"seed {seed}, image {image}: both must lie in 0..2^64-1.")


class Normals:
    """`normal` for arrays of one shape, written in place: for loops. One thread owns it (it has scratch space)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._count = math.prod(shape)
        self._pairs = (self._count + 1) // 2
        self._uniform = np.empty(2 * self._pairs)
        self._values = np.empty(2 * self._pairs)

    def fill(self, out: NDArray[np.float32], seed: int, image: int, step: int) -> None:
        """Overwrite `out`, contiguous and of this shape, with the numbers of (seed, image, step)."""
        check_key(seed, image)
        pairs, uniform, values = self._pairs, self._uniform, self._values
        # uint64 arrays: of a list with numbers from 2^63 on NumPy makes float64, in which neighbouring seeds are equal
        key, counter = np.array([seed, image], np.uint64), np.array([0, 0, step + 1, 0], np.uint64)
        bits = np.random.Philox(counter=counter, key=key).random_raw(2 * pairs)
        np.right_shift(bits, np.uint64(11), out=bits)  # 53 bits, in the open interval (0, 1)
        np.add(bits, 0.5, out=uniform)
        np.multiply(uniform, 2.0**-53, out=uniform)
        radius, angle = uniform[:pairs], uniform[pairs:]
        np.log(radius, out=radius)
        np.multiply(radius, -2, out=radius)
        np.sqrt(radius, out=radius)
        np.multiply(angle, 2 * np.pi, out=angle)
        np.cos(angle, out=values[:pairs])
        np.sin(angle, out=values[pairs:])
        values[:pairs] *= radius
        values[pairs:] *= radius
        out.reshape(-1)[:] = values[: self._count]


def normal_rows(
    seed: int, images: Sequence[int] | NDArray[np.int64], step: int, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """`normal` for several images, stacked: (len(images), *shape)."""
    values = np.empty((len(images), *shape), np.float32)
    normals = Normals(shape)
    for row, image in zip(values, images, strict=True):
        normals.fill(row, seed, int(image), step)
    return values
