"""Forecasts: calls of a chain in which what the blocks add to the tokens is extrapolated instead of computed.

The *residual* of a call is the tokens after the last block less those before the first one. A full call gives it
beside the prediction. A forecast takes it as an input and computes the embeddings and the final layer alone. It is
extrapolated linearly in the timestep through the last two full calls, as TaylorSeer (arXiv 2503.06923) of order 1 does
for each module; here it is one sum over all blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import UsageError

Float32 = NDArray[np.float32]
RESIDUAL = "residual"  # an output of the full call, an input of a forecast
LEAST_FULL = 3  # the first two calls, between which the first forecast extrapolates, and the last one


class ForecastNetwork(Protocol):
    """A network that can also forecast."""

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Float32:
        """Ports by name -> prediction (rows, K, ...)."""
        ...

    def full(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[Float32, Float32]:
        """The prediction, and the residual (rows, ...)."""
        ...

    def forecast(self, inputs: Mapping[str, NDArray[Any]]) -> Float32:
        """The prediction of the ports and a residual."""
        ...


def spread(steps: int, calls: int) -> tuple[int, ...]:
    """The steps, ascending, of which a chain of T steps computes `calls` in full: the first two, the last one, and the
    others evenly between them.
    """
    if steps < LEAST_FULL:
        raise UsageError(f"{calls} full calls of {steps} steps; expected {LEAST_FULL} steps or more. Leave them out.")
    if not LEAST_FULL <= calls <= steps:
        raise UsageError(f"{calls} full calls of {steps} steps; expected {LEAST_FULL} to {steps}.")
    found = np.round(np.linspace(0, steps - 2, calls - 1)).astype(np.int64)
    return (*found.tolist(), steps - 1)


def full_steps(full_calls: int | Sequence[int], steps: int) -> tuple[int, ...]:
    """The steps, ascending, with full calls in a chain of T steps: of these many calls (`spread`), or these ones.

    Raises UsageError for what such a chain cannot have.
    """
    if isinstance(full_calls, int | np.integer):
        return spread(steps, int(full_calls))
    full = full_numbers(full_calls)
    check_full_calls(full, steps)
    return full


def full_numbers(steps: Sequence[int]) -> tuple[int, ...]:
    """Steps with full calls as numbers. Raises UsageError for anything else."""
    try:
        return tuple(map(int, steps))
    except (TypeError, ValueError) as error:
        raise UsageError(f"full calls {steps!s:.60}; expected how many, or a list of their steps.") from error


def check_full_calls(full: Sequence[int], steps: int) -> None:
    """Refuse steps with full calls that a chain of T steps cannot have."""
    ascending = all(a < b for a, b in pairwise(full))
    if not ascending or full[0] < 0 or full[-1] != steps - 1 or steps - 2 not in full[-2:]:
        found = ", ".join(map(str, full[-8:]))
        raise UsageError(
            f"full calls at steps {found} of a chain of {steps}; expected ascending steps, {steps - 2} and {steps - 1} "
            "(the chain's first two) among them."
        )


class History:
    """The residuals of the last two full calls of up to `capacity` chains, and what they extrapolate to."""

    def __init__(self, capacity: int, rows_per_image: int, shape: tuple[int, ...]) -> None:
        """shape: of the residual of one row."""
        self._known = np.zeros((2, rows_per_image, capacity, *shape), np.float32)
        self._times = np.zeros((2, capacity))
        self._latest = [0] * capacity  # by place: which of the two is the later call
        self._place = [*range(capacity)]  # of each chain; chains that change their numbers keep it
        self._extrapolated = np.zeros((rows_per_image * capacity, *shape), np.float32)
        self._product = np.zeros(shape, np.float32)

    def swap(self, one: int, other: int) -> None:
        """Let two chains have one another's numbers."""
        place = self._place
        place[one], place[other] = place[other], place[one]

    def keep(self, times: Sequence[float], residual: Float32, guided: NDArray[np.int64] | None = None) -> None:
        """Take the residual (rows, ...) of a full call of the chains 0..len(times) - 1 at these timesteps.

        guided (U,): those with an unconditional row, if not all of them; of the others, which forecast nothing, nothing
        is kept.
        """
        count = len(times)
        for number, chain in enumerate(range(count) if guided is None else guided.tolist()):
            place = self._place[chain]
            older = 1 - self._latest[place]
            for row, kept in zip((chain, count + number), self._known[older], strict=False):  # one row, or two
                kept[place] = residual[row]
            self._times[older, place], self._latest[place] = times[chain], older

    def extrapolate(self, times: Sequence[float]) -> Float32:
        """The residuals (rows, ...) of the chains 0..len(times) - 1 at these timesteps, in place until the next time.

        d(t) = d_1 + (t - t_1) / (t_1 - t_0) (d_1 - d_0), of the full calls at t_0 and then t_1.
        """
        count = len(times)
        for chain, time in enumerate(times):
            place = self._place[chain]
            latest = self._latest[place]
            last, before = self._times[latest, place], self._times[1 - latest, place]
            weight = np.float32((time - last) / (last - before))
            for group in range(len(self._known[0])):
                out = self._extrapolated[group * count + chain]
                np.multiply(self._known[latest, group, place], 1 + weight, out=out)
                np.multiply(self._known[1 - latest, group, place], weight, out=self._product)
                out -= self._product
        return self._extrapolated[: len(self._known[0]) * count]
