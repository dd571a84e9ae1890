"""What a pipeline does between the end of its loop and its VAE: learned from one decoded run, and refused if it is not
a transposition and a scale and shift for each channel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tqdit.card import Latents, Layout
from tqdit.errors import UsageError

NO_SHIFT = 1e-5  # of the largest code
LEAST = 8  # values of a channel that its own scale and shift are fitted on
Array = NDArray[Any]


def learn_latents(states: Array, codes: Array, decoder: str, tolerance: float) -> Latents:
    """How the ends of chains (images, ...) become what the VAE's `decode` gets (images, ...).

    decoder: the VAE's class. tolerance: of the residual, relative. Raises UsageError with the least residual if none of
    the known layouts holds.
    """
    best = math.inf
    for layout in _layouts(states.shape[1:], codes.shape[1:]):
        y = _by_channel(to_states(codes, layout, states.shape), layout.axis)
        x = _by_channel(states, layout.axis)
        for each in (False, True):  # one scale and shift; one for each channel
            if each and x.shape[1] < LEAST:
                continue
            a, b, residual = _fit(x if each else x.reshape(1, -1), y if each else y.reshape(1, -1))
            best = min(best, residual)
            if residual < tolerance and np.all(a):
                scale, shift = (1 / a).tolist(), b.tolist()
                return Latents(tuple(scale) if each else scale[0], tuple(shift) if each else shift[0], layout, decoder)
    raise UsageError(
        f"what {decoder} decodes is not the states in another layout, scaled and shifted (least residual {best:.1e}, "
        f"expected less than {tolerance:.0e})"
    )


def to_codes(states: Tensor, latents: Latents) -> Tensor:
    """The codes (rows, ...) of states (rows, ...)."""
    layout = latents.layout
    shape = [-1 if axis == (layout.axis if layout else 0) else 1 for axis in range(states.ndim - 1)]
    scale, shift = (states.new_tensor(value).reshape(shape) for value in (latents.scale, latents.shift))
    codes = states / scale + shift if np.any(latents.shift) else states / scale
    if layout is None:
        return codes
    order = [0, *(axis + 1 for axis in layout.order)]
    return codes.reshape(-1, *layout.split).permute(order).reshape(-1, *layout.codes)


def to_states(codes: Array, layout: Layout, shape: Sequence[int]) -> Array:
    """Codes (rows, ...) in the layout of states, whose shape is given; the opposite of what `to_codes` permutes."""
    moved = [layout.split[axis] for axis in layout.order]
    back = [0, *(int(axis) + 1 for axis in np.argsort(layout.order))]
    return codes.reshape(-1, *moved).transpose(back).reshape(shape)


def _layouts(state: tuple[int, ...], codes: tuple[int, ...]) -> Iterator[Layout]:
    """Layouts that fit the shapes: axes in another order, or tokens (N, K) that hold patches of the codes (C, ...)."""
    for order in itertools.permutations(range(len(state))):
        if tuple(state[axis] for axis in order) == codes:
            yield Layout(order[0], state, order, codes)
    if len(state) != 2 or len(codes) < 3:
        return
    channels, *spatial = codes
    axes = len(spatial)
    for patch in itertools.product(*([p for p in range(1, size + 1) if size % p == 0] for size in spatial)):
        if math.prod(patch) * channels != state[1]:
            continue
        grid = [size // p for size, p in zip(spatial, patch, strict=True)]
        inner = (channels, *patch)
        for place in itertools.permutations(range(axes + 1)):  # of the channels and the axes of a patch within a token
            split = (*grid, *(inner[each] for each in place))
            where = {each: axes + index for index, each in enumerate(place)}
            order = (where[0], *itertools.chain.from_iterable((axis, where[axis + 1]) for axis in range(axes)))
            yield Layout(1, split, order, codes)


def _by_channel(states: Array, axis: int) -> Array:
    """(channels, values) of states (images, ...)."""
    moved = np.moveaxis(states.astype(np.float64), axis + 1, 0)
    return moved.reshape(len(moved), -1)


def _fit(x: Array, y: Array) -> tuple[Array, Array, float]:
    """a and b (rows,) of y = a x + b by least squares, and the residual relative to y's size."""
    mean_x, mean_y = x.mean(1, keepdims=True), y.mean(1, keepdims=True)
    spread = np.square(x - mean_x).sum(1)
    a = ((x - mean_x) * (y - mean_y)).sum(1) / np.where(spread > 0, spread, 1)
    b = mean_y[:, 0] - a * mean_x[:, 0]
    b = np.where(np.abs(b) < NO_SHIFT * np.abs(y).max(), 0, b)
    residual = np.linalg.norm(a[:, None] * x + b[:, None] - y) / max(float(np.linalg.norm(y)), 1e-30)
    return a, b, float(residual)
