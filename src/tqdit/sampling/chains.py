"""The sampling loop: chains from noise to data, a row each, in buffers that are allocated once. NumPy alone.

Calibration, `Sampler`, `StepBatcher`, shards and evaluation all run chains from here, so an image cannot depend on
which of them made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import BackendError, SamplingError
from tqdit.ports import NEGATIVE, Signature
from tqdit.sampling import noise
from tqdit.sampling.correction import BIAS, GAIN, REDUCED, Correction, nothing
from tqdit.sampling.forecasts import RESIDUAL, ForecastNetwork, History
from tqdit.sampling.guidance import Guidance, column, rows_per_image
from tqdit.sampling.schedule import MOST_LAG, Schedule

Float32 = NDArray[np.float32]
Network = Callable[[Mapping[str, NDArray[Any]]], Float32]  # ports by name -> prediction; an engine is one
INPUT_SCALE, NOISE, LOW, SPREAD = range(4)  # columns of a step's coefficients; weights of states and predictions follow


class Chains:
    """Up to `capacity` chains, each with its own schedule, step, request and seed. Not thread-safe: one thread owns it.

    The chains in use are 0..count-1. `remove` moves the last one into the gap. What is computed for a chain does not
    depend on its place or on its neighbours.
    """

    def __init__(
        self, signature: Signature, guidance: Guidance | None, capacity: int, correction: Correction | None = None
    ) -> None:
        """correction: of the network's errors; of chains with another guidance scale nothing is corrected."""
        signature.check_predicts_state()
        if correction is not None:
            correction.check_channels(signature.channels)
        self.correction = correction
        self._corrections: list[Float32] = []  # (T, 2 + C) or (1, 2 + C), one per chain if there is a correction
        self.signature, self.guidance = signature, guidance
        self.count = 0
        self._capacity = capacity
        self._rows_per_image = rows_per_image(guidance)
        self._shape, self._output_shape = signature.state.row_shape, signature.output_shape
        self._normals = noise.Normals(self._shape)
        self._keys = [(0, 0)] * capacity  # seed, image: beyond int64
        self._schedules: list[Schedule] = []
        self._tables: list[Float32] = []  # of coefficients, one per chain
        self._step = np.zeros(capacity, np.int64)
        self._scale = np.zeros(capacity, np.float32)
        self._x = self._state_buffer()
        self._noise, self._prediction, self._product = (self._state_buffer() for _ in range(3))
        self._states: list[Float32] = []  # of the steps before, the latest first; `advance` writes into the oldest
        self._predictions: list[Float32] = []
        self._requests = {name: port.zeros(capacity) for name, port in signature.request_values.items()}
        self._inputs = {port.name: port.zeros(capacity * self._rows_per_image) for port in signature.ports}
        self._views: dict[str, NDArray[Any]] | None = None  # of the inputs; None: the rows of a call have changed
        self._guided: NDArray[np.int64] | None = None  # chains with an unconditional row; None: all or, unguided, none
        self._current: Float32 | None = None  # coefficients of the steps to compute; None: not gathered yet
        self._history: History | None = None  # residuals of full calls; None: no chain has had one beside forecasts
        self._finite_values = np.zeros((capacity, self._x[0].size if capacity else 0), np.bool_)
        self._finite = np.zeros(capacity, np.bool_)

    def _state_buffer(self) -> Float32:
        return np.zeros((self._capacity, *self._shape), np.float32)

    @property
    def x(self) -> Float32:
        """The states (count, ...) in place: copy them to keep them past the next step."""
        return self._x[: self.count]

    @property
    def prediction(self) -> Float32:
        """The predictions (count, ...) that the last step was made with, guided, in place."""
        return self._prediction[: self.count]

    def step_of(self, chain: int) -> int:
        """The step that this chain computes next; -1 after its last one."""
        return int(self._step[chain])

    def add(self, schedule: Schedule, request: Mapping[str, NDArray[Any]], scale: float, seed: int, image: int) -> int:
        """Begin a chain and return its number. request: port -> one row of `check_requests`."""
        chain = self.count
        self._keys[chain] = seed, image
        self._grow(schedule.lag)
        self._normals.fill(self._x[chain], seed, image, noise.INITIAL)
        self._x[chain] *= np.float32(schedule.initial_scale)
        for past in (*self._states, *self._predictions):
            past[chain] = 0  # what an earlier chain left may be infinite, and zero times infinity is not zero
        for name, values in self._requests.items():
            values[chain] = request[name]
        self._step[chain], self._scale[chain] = len(schedule) - 1, scale
        self._schedules.append(schedule)
        self._tables.append(coefficients(schedule))
        if self.correction is not None:
            found = self.correction.of(schedule, scale)
            if found is None:
                found = np.tile(nothing(self._shape[0]), (len(schedule), 1))
            self._corrections.append(found)
        self._resize(chain + 1)
        return chain

    def remove(self, chain: int) -> None:
        """End a chain; the last one takes its number."""
        last = self.count - 1
        if self._history is not None:
            self._history.swap(chain, last)
        if chain != last:
            self._keys[chain] = self._keys[last]
            self._schedules[chain], self._tables[chain] = self._schedules[last], self._tables[last]
            for array in self._arrays():
                array[chain] = array[last]
            if self._corrections:
                self._corrections[chain] = self._corrections[last]
        del self._schedules[last:], self._tables[last:], self._corrections[last:]
        self._resize(last)

    def swap(self, one: int, other: int) -> None:
        """Let two chains have one another's numbers."""
        if one == other:
            return
        lists: tuple[list[Any], ...] = (self._keys, self._schedules, self._tables, self._corrections)
        for values in filter(None, lists):
            values[one], values[other] = values[other], values[one]
        for array in self._arrays():
            array[[one, other]] = array[[other, one]]
        if self._history is not None:
            self._history.swap(one, other)
        self._views = self._current = None

    @contextmanager
    def first(self, count: int) -> Iterator[None]:
        """Inside, the chains 0..count-1 are all that there are: `step` leaves the others where they stand."""
        self._resize(count)
        try:
            yield
        finally:
            self._resize(len(self._schedules))

    def is_full(self, chain: int) -> bool:
        """Whether the network call of this chain's next step is full, and no forecast."""
        full = self._schedules[chain].full
        return full is None or bool(full[self._step[chain]])

    def step(self, network: Network) -> NDArray[np.bool_]:
        """Call the network and make one step of every chain; which are finite: bool (count,).

        The calls are full, or all of them are forecasts; then the network must be a `ForecastNetwork`.
        """
        inputs = self.inputs()
        if all(schedule.full is None for schedule in self._schedules[: self.count]):
            return self.advance(network(inputs))
        forecaster, times = cast(ForecastNetwork, network), self._times()
        kinds = {self.is_full(chain) for chain in range(self.count)}
        if kinds == {False}:
            assert self._history is not None, "a chain begins with full calls"
            return self.advance(forecaster.forecast({**inputs, RESIDUAL: self._history.extrapolate(times)}))
        assert kinds == {True}, "forecasts and full calls are calls apart"
        prediction, residual = forecaster.full(inputs)
        if self._history is None:
            self._history = History(self._capacity, self._rows_per_image, residual.shape[1:])
        self._history.keep(times, residual, self._guided)
        return self.advance(prediction)

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """A copy of all that changes from step to step, by name, for `restore` on chains that were added alike."""
        return {name: array.copy() for name, array in self._moving().items()}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        for name, array in self._moving().items():
            array[:] = arrays[name]

    def _arrays(self) -> tuple[NDArray[Any], ...]:
        """All that holds a row for each chain."""
        return (self._x, self._step, self._scale, *self._states, *self._predictions, *self._requests.values())

    def _moving(self) -> dict[str, NDArray[Any]]:
        past = {f"state-{age}": array for age, array in enumerate(self._states)}
        past |= {f"prediction-{age}": array for age, array in enumerate(self._predictions)}
        return {"x": self._x, "step": self._step, **past}

    def inputs(self) -> Mapping[str, NDArray[Any]]:
        """The ports of the next network call: views of shape (count * rows per image, ...), conditional rows first.

        A chain whose step is outside its guidance interval has no unconditional row.
        """
        guided = self._guided_chains()
        if self._views is None or not _equal(guided, self._guided):
            self._guided = guided
            self._views = self._fill_requests()
        count, signature = self.count, self.signature
        state, time = self._views[signature.state.name], self._views[signature.time.name]
        np.multiply(self.x, column(self._coefficients()[:, INPUT_SCALE], state.ndim), out=state[:count])
        time[:count] = self._times()
        if self.guidance is not None:
            chosen = slice(count) if guided is None else guided
            state[count:], time[count:] = state[chosen], time[chosen]
        return self._views

    def advance(self, output: Float32) -> NDArray[np.bool_]:
        """Take the network's prediction, make one step of every chain, and say which are finite: bool (count,).

        output (count * rows per image, K, ...). Raises BackendError for another shape.
        """
        count = self.count
        expected = (self._rows, *self._output_shape)
        if output.shape != expected:
            raise BackendError(f"the engine returned shape {output.shape} for {expected}. Build the engine again.")
        x, prediction, rows = self.x, self._prediction[:count], self._coefficients()
        if self.guidance is None:
            np.copyto(prediction, output[:, : self._shape[0]])
        else:
            self.guidance.combine(output, self._scale[:count], prediction, self._guided)
        reduced = self._correct(prediction)
        noise_part = self._noise_of(rows, output[:count, self._shape[0] :], reduced)
        self._update(prediction, [column(weight, x.ndim) for weight in rows[:, SPREAD + 1 :].T])
        if noise_part is not None:
            x += noise_part
        self._step[:count] -= 1
        self._current = None
        values, finite = self._finite_values[:count], self._finite[:count]
        np.isfinite(x.reshape(count, -1), out=values)
        return np.all(values, axis=1, out=finite)

    def failure(self, chain: int) -> SamplingError:
        """The error for a chain that `advance` found not to be finite."""
        request = ", ".join(f"{name} {values[chain]}" for name, values in self._requests.items() if values.ndim == 1)
        return SamplingError(
            f"image {self._keys[chain][1]}{f' ({request})' if request else ''} became NaN or infinite at step "
            f"{self.step_of(chain) + 1}. Lower the guidance scale, or export the model again from a good checkpoint."
        )

    def _times(self) -> list[float]:
        """The timestep of the step that each chain computes next."""
        steps = self._step[: self.count].tolist()
        return [float(schedule.timesteps[step]) for schedule, step in zip(self._schedules, steps, strict=False)]

    def _coefficients(self) -> Float32:
        """Of the step that each chain computes next: (count, ...), or (1, ...) if all chains compute the same one."""
        if self._current is None:
            first, step = self._tables[0], int(self._step[0])
            steps, tables = self._step[: self.count].tolist(), self._tables[: self.count]
            if all(table is first for table in tables) and steps.count(step) == len(steps):
                self._current = first[step : step + 1]
            else:
                self._current = np.stack([table[step] for table, step in zip(tables, steps, strict=True)])
        return self._current

    def _correct(self, prediction: Float32) -> Float32 | None:
        """Take back what is known of the prediction's error; the variances (count,) by which the steps' noise falls."""
        if not self._corrections:
            return None
        steps = self._step[: self.count].tolist()
        found = np.stack([table[step] for table, step in zip(self._corrections, steps, strict=False)])
        bias = found[:, BIAS:]
        prediction -= bias.reshape(*bias.shape, *[1] * (prediction.ndim - 2))
        prediction *= column(found[:, GAIN], prediction.ndim)
        return found[:, REDUCED]

    def _update(self, prediction: Float32, weights: list[Float32]) -> None:
        """x = the weighted states and predictions of this step and of the steps before."""
        x, states, predictions = self.x, self._states, self._predictions
        if states:  # the last place of both lists is for the values of this step
            np.copyto(states[-1][: self.count], x)
            np.copyto(predictions[-1][: self.count], prediction)
        x *= weights[0]
        self._accumulate(prediction, weights[MOST_LAG + 1])
        for age, (state, output) in enumerate(zip(states[:-1], predictions[:-1], strict=True)):
            self._accumulate(state[: self.count], weights[1 + age])
            self._accumulate(output[: self.count], weights[MOST_LAG + 2 + age])
        for past in filter(None, (states, predictions)):
            if self.count == len(self._schedules):
                past[:] = past[-1:] + past[:-1]
            else:  # the lists are also those of chains that make no step now
                for array in past:
                    held = array[: self.count].copy()
                    np.copyto(array[: self.count], past[-1][: self.count])
                    np.copyto(past[-1][: self.count], held)

    def _accumulate(self, values: Float32, weight: Float32) -> None:
        """x += weight values."""
        product = self._product[: self.count]
        np.multiply(values, weight, out=product)
        self._x[: self.count] += product

    def _noise_of(self, rows: Float32, learned: Float32, reduced: Float32 | None) -> Float32 | None:
        """sigma noise of each chain; None if no chain adds any. rows: the coefficients of each chain's step; reduced
        (count,): what sigma^2 falls by, to 0 at the lowest."""
        weights = rows[:, NOISE]
        if not weights.any():
            return None
        drawn, factor = self._noise[: self.count], self._product[: self.count]
        keys = [(*key, step) for key, step in zip(self._keys, self._step[: self.count].tolist(), strict=False)]
        if weights.all():
            self._normals.fill_rows(drawn, keys)
        else:
            for chain, weight in enumerate(weights):
                if weight:
                    self._normals.fill(drawn[chain], *keys[chain])
                else:
                    drawn[chain] = 0
        if rows[:, LOW : SPREAD + 1].any():
            np.add(learned, 1, out=factor)
            factor *= column(0.25 * rows[:, SPREAD], factor.ndim)  # half of the log variance, of half the range
            factor += column(0.5 * rows[:, LOW], factor.ndim)
            # in float64, since float32 ones of two libraries differ in the last bit (docs/engine-bundle.md)
            np.exp(factor, out=factor, dtype=np.float64, casting="same_kind")
            drawn *= factor
        else:
            factor[...] = 1
        if not np.all(weights == 1):
            drawn *= column(weights, drawn.ndim)
        if reduced is not None:  # a share of 1 changes no bit
            sigma = factor * column(weights, drawn.ndim)
            lost = np.divide(column(reduced, drawn.ndim), sigma * sigma, out=np.zeros_like(sigma), where=sigma != 0)
            drawn *= np.sqrt(np.maximum(1 - lost, 0))
        return drawn

    def _grow(self, lag: int) -> None:
        """Room for the states and predictions of `lag` steps before, and of the step that is being computed."""
        while lag and len(self._states) <= lag:
            self._states.append(self._state_buffer())
            self._predictions.append(self._state_buffer())

    def _resize(self, count: int) -> None:
        self.count = count
        self._views = self._current = None

    @property
    def _rows(self) -> int:
        """Of the network call."""
        return self.count * self._rows_per_image if self._guided is None else self.count + len(self._guided)

    def _guided_chains(self) -> NDArray[np.int64] | None:
        """Those whose step has guidance; None: all of them, or the model has none."""
        masks = [schedule.guided for schedule in self._schedules[: self.count]]
        if self.guidance is None or all(mask is None for mask in masks):
            return None
        steps = self._step[: self.count]
        found = np.flatnonzero([mask is None or mask[step] for mask, step in zip(masks, steps, strict=True)])
        return None if len(found) == self.count else found

    def _fill_requests(self) -> dict[str, NDArray[Any]]:
        """The inputs of the chains in use, with the requests in them."""
        count = self.count
        views = {name: values[: self._rows] for name, values in self._inputs.items()}
        chosen = slice(count) if self._guided is None else self._guided
        for port in self.signature.requests:
            view = views[port.name]
            view[:count] = self._requests[port.name][:count]
            if self.guidance is not None and port.null == "own":
                view[count:] = self._requests[f"{NEGATIVE}{port.name}"][chosen]
            elif self.guidance is not None:
                view[count:] = view[chosen] if port.null is None else port.null
        return views


def _equal(a: NDArray[np.int64] | None, b: NDArray[np.int64] | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


@lru_cache(maxsize=256)
def coefficients(schedule: Schedule) -> Float32:
    """Of each step: input scale, noise weight, low and range of the log variance, weights: (T, 4 + 2 MOST_LAG + 2)."""
    low, high = schedule.log_variance or (np.zeros(len(schedule)), np.zeros(len(schedule)))
    noisy = schedule.noise_weight != 0  # without noise its variance is not used, whatever the network predicts
    padding = [(0, 0), (0, MOST_LAG - schedule.lag)]
    columns = [schedule.input_scale, schedule.noise_weight, noisy * low, noisy * (high - low)]
    weights = [np.pad(array, padding) for array in (schedule.state_weights, schedule.output_weights)]
    return np.concatenate([np.stack(columns, axis=1), *weights], axis=1).astype(np.float32)


def run(chains: Chains, network: Network, after: Callable[[int], object] = lambda _: None) -> Float32:
    """Run chains of one schedule, all at one step, to their ends; `after` is called with every step that is done.

    Returns the states (count, ...) in place. Raises SamplingError if a chain becomes NaN or infinite.
    """
    while (step := chains.step_of(0)) >= 0:
        finite = chains.step(network)
        if not finite.all():
            raise chains.failure(int(np.flatnonzero(~finite)[0]))
        after(step)
    return chains.x
