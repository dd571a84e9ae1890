"""Forecasts in a loop that is not ours, such as a pipeline's: the scheduler tells where its chain is. NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import UsageError
from tqdit.sampling.forecasts import RESIDUAL, ForecastNetwork, History, full_numbers, full_steps

Float32 = NDArray[np.float32]
MOST_CALLS = 4  # of the network in one step, such as one for each prompt
PRECISION = 1e-6  # of float32 timesteps after a product
Clock = tuple[float, float]  # a, b: the network is told a t + b at the scheduler's timestep t


class Followed:
    """The network calls of the chains of one scheduler, one chain after another. Not thread-safe.

    A chain begins when the scheduler has another array of timesteps, or at the first timestep again. Calls at one
    timestep belong to one step, and each has its own residuals: 2 and what they extrapolate to, for each of its rows.
    Nothing is kept from one chain to the next.
    """

    def __init__(self, scheduler: Any, full_calls: int | Sequence[int], clocks: Sequence[Clock]) -> None:
        """scheduler: one of diffusers, with `timesteps`. full_calls: how many, or their steps, counted T-1..0. clocks:
        those that the network may go by, of which the first call of a chain tells one.
        """
        self._scheduler, self._clocks = scheduler, tuple(clocks)
        self._full_calls = full_calls if isinstance(full_calls, int | np.integer) else full_numbers(full_calls)
        self._chain: _Chain | None = None

    def __call__(
        self, network: ForecastNetwork, inputs: Mapping[str, NDArray[Any]], time: float, precision: float = 0.0
    ) -> Float32:
        """The prediction of the next call of the loop, full or a forecast.

        inputs: ports by name, (rows, ...). time: what the network is told, with a relative error of `precision`. Raises
        UsageError for a call that is not the next one of a chain; the call after it begins one.
        """
        chain, self._chain = self._chain, None  # no chain goes on after an error
        precision = max(precision, PRECISION)
        mark = getattr(self._scheduler, "step_index", None), time  # rounded times of two steps may be the same
        if chain is None or chain.timesteps is not self._scheduler.timesteps:
            chain = self._begin(time, precision)
        elif mark == chain.mark:
            chain.call_again()
        elif chain.is_next(time, precision):
            chain.go_on()
        elif chain.is_first(time, precision):
            chain = self._begin(time, precision)
        else:
            raise UsageError(
                f"the network is called at timestep {time:g}; expected {chain.expected}, as {self._name} says. "
                "Begin a chain with the pipeline's own scheduler: forecast(pipeline.scheduler, full_calls=...)."
            )
        chain.mark = mark
        prediction = chain.predict(network, inputs)
        self._chain = chain
        return prediction

    @property
    def _name(self) -> str:
        return type(self._scheduler).__name__

    def _begin(self, time: float, precision: float) -> _Chain:
        """A chain from this timestep to the scheduler's last one. Of two clocks, it is the one that begins earlier."""
        timesteps = self._scheduler.timesteps
        times = np.asarray([] if timesteps is None else timesteps.tolist(), np.float64)
        if len(times) != len(set(times)):
            raise UsageError(f"{self._name} visits a timestep twice, so it has no forecasts. Choose another scheduler.")
        counted = getattr(self._scheduler, "step_index", None)
        counted = getattr(self._scheduler, "begin_index", None) if counted is None else counted
        steps = [(_steps_at(times, clock, time, precision), clock) for clock in self._clocks]
        found = [(counted if counted in each else each[0], clock) for each, clock in steps if each]
        if not found:
            raise UsageError(
                f"the network is called at timestep {time:g}, which is none of the {len(times)} of {self._name}. "
                "Forecast with the pipeline's own scheduler: forecast(pipeline.scheduler, full_calls=...)."
            )
        first, clock = min(found)
        return _Chain(timesteps, times[first:], clock, self._full_calls)


class _Chain:
    """A chain that is running: its step, counted from 0 at the first one, and the call of that step."""

    def __init__(
        self, timesteps: Any, times: NDArray[np.float64], clock: Clock, full_calls: int | Sequence[int]
    ) -> None:
        self.timesteps = timesteps  # the scheduler's own object, which is another one for another chain
        self.mark: tuple[Any, float] | None = None  # of the step: what the scheduler counts, and the network's timestep
        self._times, self._clock = times, clock
        self._full = {len(times) - 1 - step for step in full_steps(full_calls, len(times))}
        self._step = self._call = 0
        self._calls: int | None = None  # of each step; None: the first one has not ended
        self._histories: list[tuple[int, History]] = []  # by the call of a step, with its rows

    @property
    def expected(self) -> str:
        steps = [step for step in (self._step, self._step + 1) if step < len(self._times)]
        return " or ".join(f"{self._told(step):g}" for step in steps)

    def is_first(self, time: float, precision: float) -> bool:
        return self._is_at(0, time, precision)

    def is_next(self, time: float, precision: float) -> bool:
        return self._step + 1 < len(self._times) and self._is_at(self._step + 1, time, precision)

    def call_again(self) -> None:
        """The next call of the same step."""
        self._call += 1
        if self._call == (MOST_CALLS if self._calls is None else self._calls):
            raise self._other_calls(self._call + 1)

    def go_on(self) -> None:
        """The first call of the next step."""
        if self._calls is None:
            self._calls = self._call + 1
        elif self._call + 1 != self._calls:
            raise self._other_calls(self._call + 1)
        self._step, self._call = self._step + 1, 0

    def predict(self, network: ForecastNetwork, inputs: Mapping[str, NDArray[Any]]) -> Float32:
        rows = len(next(iter(inputs.values())))
        times = [float(self._times[self._step])] * rows
        if self._call < len(self._histories) and rows != self._histories[self._call][0]:
            raise UsageError(
                f"the network is called with {rows} rows at step {self._step + 1} of a chain that began with "
                f"{self._histories[self._call][0]}; a forecast needs the same rows. Begin a chain with these."
            )
        if self._step not in self._full:
            return network.forecast({**inputs, RESIDUAL: self._histories[self._call][1].extrapolate(times)})
        prediction, residual = network.full(inputs)
        if self._call == len(self._histories):
            self._histories.append((rows, History(rows, 1, residual.shape[1:])))
        self._histories[self._call][1].keep(times, residual)
        return prediction

    def _told(self, step: int) -> float:
        a, b = self._clock
        return a * float(self._times[step]) + b

    def _is_at(self, step: int, time: float, precision: float) -> bool:
        return bool(_steps_at(self._times[step : step + 1], self._clock, time, precision))

    def _other_calls(self, found: int) -> UsageError:
        most = f"at most {MOST_CALLS}" if self._calls is None else f"{self._calls}, as in its first step"
        return UsageError(
            f"step {self._step + 1} of the chain calls the network {found} times; forecasts expect {most}. Guide every "
            "step or none, or end forecasts: forecast(scheduler, full_calls=None)."
        )


def _steps_at(times: NDArray[np.float64], clock: Clock, time: float, precision: float) -> list[int]:
    """The steps at which the network may be told this timestep, which is rounded."""
    a, b = clock
    error = np.abs(a * times + b - time)
    return np.flatnonzero(error <= precision * (np.abs(a * times) + abs(b)) + PRECISION).tolist()
