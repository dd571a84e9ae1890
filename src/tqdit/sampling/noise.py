"""Noise that depends on nothing but (seed, image, step).

Philox4x64-10 (Salmon et al., SC'11), a counter-based generator: the key is (seed, image), the counter starts at
(0, 0, draw, 0), where draw 0 is the initial latent and draw step + 1 the noise of a step. Batches, neighbours,
backends, workers and the order of requests therefore cannot change it. The raw 64-bit stream is fixed by NumPy's
compatibility promise for bit generators; the normal numbers come from it by the Box-Muller transform in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.bounds import check_count

INITIAL = -1  # the "step" of the initial latent
BLOCK = 4096  # pairs of numbers that are made at a time: their scratch space fits into a core's cache


def normal(seed: int, image: int, step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal float32 numbers of `shape` for one image at one step; step INITIAL gives x_T.

    seed and image are in 0..2^64-1, step in -1..2^63-1.
    """
    values = np.empty(shape, np.float32)
    Normals(shape).fill(values, seed, image, step)
    return values


def check_key(seed: int, image: int) -> None:
    """Refuse what the generator cannot take as its key."""
    check_count("seed", seed, 0, 2**64 - 1)
    check_count("image", image, 0, 2**64 - 1)


class Normals:
    """`normal` for many arrays of one shape, written in place: for loops. One thread owns it (it has scratch space)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._count = math.prod(shape)
        self._pairs = (self._count + 1) // 2
        self._rows = max(1, BLOCK // max(1, self._pairs))
        self._bits = np.empty((2, self._rows, self._pairs), np.uint64)
        self._uniform, self._values = np.empty(self._bits.shape), np.empty(self._bits.shape)
        self._generator = np.random.Philox(key=0)
        self._state: Any = self._generator.state  # with an empty buffer

    def fill(self, out: NDArray[np.float32], seed: int, image: int, step: int) -> None:
        """Overwrite `out`, contiguous and of this shape, with the numbers of (seed, image, step)."""
        self.fill_rows(out[None], [(seed, image, step)])

    def fill_rows(self, out: NDArray[np.float32], keys: Sequence[tuple[int, int, int]]) -> None:
        """Overwrite each row of `out`, contiguous (len(keys), *shape), with the numbers of its (seed, image, step)."""
        flat = out.reshape(len(keys), self._count)
        for start in range(0, len(keys), self._rows):
            self._fill_block(flat[start : start + self._rows], keys[start : start + self._rows])

    def _fill_block(self, out: NDArray[np.float32], keys: Sequence[tuple[int, int, int]]) -> None:
        rows, pairs = len(keys), self._pairs
        bits, uniform, values = self._bits[:, :rows], self._uniform[:, :rows], self._values[:, :rows]
        for row, key in enumerate(keys):
            bits[:, row] = self._draw(*key).reshape(2, pairs)
        np.right_shift(bits, np.uint64(11), out=bits)  # 53 bits, in the open interval (0, 1)
        np.add(bits, 0.5, out=uniform)
        np.multiply(uniform, 2.0**-53, out=uniform)
        radius, angle = uniform
        np.log(radius, out=radius)
        np.multiply(radius, -2, out=radius)
        np.sqrt(radius, out=radius)
        np.multiply(angle, 2 * np.pi, out=angle)
        np.cos(angle, out=values[0])
        np.sin(angle, out=values[1])
        values *= radius
        out[:, :pairs] = values[0]
        out[:, pairs:] = values[1, :, : self._count - pairs]

    def _draw(self, seed: int, image: int, step: int) -> NDArray[np.uint64]:
        """The bits of one array: a new generator's, without the time that it takes to make one."""
        check_key(seed, image)
        counter_and_key = self._state["state"]  # uint64 arrays: as float64, neighbouring seeds from 2^53 on are equal
        counter_and_key["counter"][2] = step + 1
        counter_and_key["key"][0], counter_and_key["key"][1] = seed, image
        self._generator.state = self._state
        return self._generator.random_raw(2 * self._pairs)
