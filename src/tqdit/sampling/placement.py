"""Where the steps of a short chain lie, and which of its calls are full: published spacings, and what is best for one
model.

A short chain's step from timestep i to j, after one from h, ends beside the state that a long chain reaches at j. These
local errors are inner products of the long chain's states and predictions, so dynamic programming over the pairs
(h, i), (i, j) finds the places with the least sum of them. The idea of choosing steps by the solver's own error is that
of Align Your Steps (arXiv 2404.14507); errors of stored chains in place of a bound, and the dynamic programme, are as
in arXiv 2106.03802.

Which calls are full is found in the same way: a forecast's residual, extrapolated from two full calls, errs by an inner
product of the long chain's residuals, so dynamic programming over the pairs of full calls finds the best ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import UsageError
from tqdit.sampling.chains import Chains, Network
from tqdit.sampling.forecasts import LEAST_FULL, ForecastNetwork
from tqdit.sampling.process import TRAINING_STEPS, Diffusion, Float64, Flow
from tqdit.sampling.schedule import Schedule, find_samplers

Float32 = NDArray[np.float32]
KEPT = ("states", "predictions", "residuals")  # of a long chain; the last one if calls are to be forecast
ENTRIES = 4096  # of an image's residuals that are kept, drawn once; their inner products stand for those of all
LONG = ("dpm++2m", 100)  # sampler and steps of a long chain
LEARNED, STRIDE = 8, 2  # chains by which steps are placed, and every which of their timesteps can become a step
MOST_PLACED = LONG[1] // STRIDE  # steps of a placed chain
FIRST_IMAGE = 2**41  # of the noise of long chains, apart from that of calibration rows and of what anybody samples
RHO = 7  # of Karras et al. (EDM, arXiv 2206.00364, eq. 5)
LEAST_SIGNAL = 1e-3  # of a flow, whose first state has none


def spacings(process: Diffusion | Flow, steps: int) -> dict[str, tuple[float, ...]]:
    """Published spacings by name, timesteps ascending; 'uniform' is the sampler's own, ()."""
    a, b = process.mix(_places(process))
    noise = b / a if isinstance(process, Diffusion) else b  # what Karras' spacing goes by: for a flow, t itself
    measures = {"karras": noise ** (1 / RHO), "log-snr": -_log_snr(a, b)}
    return {"uniform": (), **{name: _at_even(process, measure, steps) for name, measure in measures.items()}}


def dense(process: Diffusion | Flow, steps: int) -> tuple[float, ...]:
    """The timesteps of a long chain: as many lie evenly in t as in log-SNR, in one another's midst."""
    log_snr = -_log_snr(*process.mix(_places(process)))
    share = (log_snr - log_snr[0]) / (log_snr[-1] - log_snr[0])
    return _at_even(process, share + np.linspace(0, 1, TRAINING_STEPS), steps)


def _places(process: Diffusion | Flow) -> Float64:
    """The timesteps that a step may visit, ascending, (1000,)."""
    if isinstance(process, Diffusion):
        return np.arange(TRAINING_STEPS, dtype=np.float64)
    return process.timesteps(TRAINING_STEPS)


def _log_snr(a: Float64, b: Float64) -> Float64:
    return np.log(np.maximum(a, LEAST_SIGNAL) / b)


def _at_even(process: Diffusion | Flow, measure: Float64, steps: int) -> tuple[float, ...]:
    """The places at which an increasing measure has T even values, or the nearest free ones."""
    if not 2 <= steps <= TRAINING_STEPS:
        raise UsageError(f"{steps} steps to place; expected 2 to {TRAINING_STEPS}.")
    wanted = np.linspace(measure[0], measure[-1], steps)
    found = np.round(np.interp(wanted, measure, np.arange(TRAINING_STEPS))).astype(np.int64)
    order = np.arange(steps)
    found = np.maximum.accumulate(found - order) + order  # distinct
    found = np.minimum(found, TRAINING_STEPS - steps + order)
    return tuple(_places(process)[found].tolist())


@dataclass(frozen=True, eq=False)
class LongChain:
    """N chains that visit `timesteps` (T,), ascending, and the predictions there.

    states, predictions float32 (T, N, ...), indexed by the step; ends (N, ...). The last predictions are guided.
    residuals (T, N, E): entries of what the blocks add to the tokens of all rows of an image, or None.
    """

    timesteps: Float64
    states: Float32
    predictions: Float32
    ends: Float32
    residuals: Float32 | None = None

    @classmethod
    def follow(
        cls, chains: Chains, network: Network | ForecastNetwork, timesteps: Float64,
        after: Callable[[int, Mapping[str, Float32]], object], kept: Mapping[str, Float32] | None = None,
        residuals: bool = False,
    ) -> LongChain:  # fmt: skip
        """Run chains that all stand at one step to their ends. kept: the states and predictions of earlier steps.

        after: called with every step that is done and all states and predictions so far. residuals: keep entries of
        them, too; then the network must be a `ForecastNetwork`. Raises SamplingError if a chain becomes NaN or
        infinite.
        """
        found = dict(kept or {})
        while (step := chains.step_of(0)) >= 0:
            now = {"states": chains.x.copy()}
            if residuals:
                output, residual = cast(ForecastNetwork, network).full(chains.inputs())
                now["residuals"] = _entries(residual, chains.count)
            else:
                output = network(chains.inputs())
            finite = chains.advance(output)
            if not finite.all():
                raise chains.failure(int(np.flatnonzero(~finite)[0]))
            now["predictions"] = chains.prediction
            for name, values in now.items():
                found.setdefault(name, np.zeros((len(timesteps), *values.shape), np.float32))[step] = values
            after(step, found)
        return cls(timesteps, found["states"], found["predictions"], chains.x.copy(), found.get("residuals"))

    def part(self, chains: int, stride: int) -> LongChain:
        """The first chains, and every `stride`th timestep, the highest among them."""
        every = slice((len(self.timesteps) - 1) % stride, None, stride)
        return LongChain(
            self.timesteps[every], self.states[every, :chains], self.predictions[every, :chains], self.ends[:chains],
            None if self.residuals is None else self.residuals[every, :chains],
        )  # fmt: skip

    def products(self) -> Float64:
        """Inner products of all states, all predictions and the ends, mean over chains relative to |end|^2:
        (2 T + 1, 2 T + 1)."""
        count = len(self.ends)
        energy = np.square(self.ends.reshape(count, -1), dtype=np.float64).sum(axis=1)
        total = np.zeros((2 * len(self.timesteps) + 1,) * 2)
        for chain in range(count):
            parts = (self.states[:, chain], self.predictions[:, chain], self.ends[chain : chain + 1])
            vectors = np.concatenate([part.reshape(len(part), -1) for part in parts]).astype(np.float64)
            total += vectors @ vectors.T / (energy[chain] * count)
        return total

    def residual_products(self, timesteps: Float64) -> Float64:
        """Inner products of the residuals at any timesteps (S,), sum over chains, those between two timesteps of the
        chain interpolated linearly: (S, S)."""
        assert self.residuals is not None
        total = sum(each @ each.T for each in np.moveaxis(self.residuals, 1, 0).astype(np.float64))
        weights = np.stack([np.interp(timesteps, self.timesteps, row) for row in np.eye(len(self.timesteps))], axis=1)
        found: Float64 = weights @ total @ weights.T
        return found


def _entries(residual: Float32, images: int) -> Float32:
    """ENTRIES of the residuals (rows, ...) of each image, all its rows together: (images, E)."""
    of_images = np.moveaxis(residual.reshape(-1, images, *residual.shape[1:]), 1, 0).reshape(images, -1)
    size = of_images.shape[1]
    drawn = np.random.default_rng(0).choice(size, min(ENTRIES, size), replace=False, shuffle=False)
    return of_images[:, np.sort(drawn)]


def place(
    chain: LongChain, process: Diffusion | Flow, sampler: str, counts: Sequence[int]
) -> dict[int, tuple[float, ...]]:
    """For each number T of steps the T timesteps, among those of the chain, between which the sampler's steps err least
    in all; the highest is the chain's first one.

    The squares of local errors are added, each in units of the state that it is an error of: as if an error grew as
    states do on the way to the end. A sampler that looks back at more than one step is taken to begin at h.
    """
    errors = _Errors(chain, process, sampler)
    places = len(chain.timesteps)
    if not 2 <= min(counts) <= max(counts) <= places:
        raise UsageError(f"{max(counts)} steps to place among {places} timesteps; expected 2 to {places}.")
    top = places - 1
    between, last = np.full((places, places, places), np.inf), np.full((places, places), np.inf)
    cost = np.full((places, places), np.inf)  # of the best chain whose last step went from h to i: [h, i]
    for h in range(1, places):
        for i in range(h):
            last[h, i] = errors.of((i, h), None)
            for j in range(i):
                between[h, i, j] = errors.of((i, h), j)
    cost[top, :top] = [errors.of((top,), j) for j in range(top)]
    found: dict[int, tuple[float, ...]] = {}
    for steps, (reached, came) in enumerate(_best_chains(cost, between, max(counts)), 2):
        if steps in counts:
            found[steps] = tuple(chain.timesteps[_cheapest(reached + last, came)].tolist())
    return found


def place_full(chain: LongChain, schedule: Schedule, calls: int) -> tuple[int, ...]:
    """The steps, ascending, of which a schedule of T steps computes `calls` in full so that its forecasts err least in
    all.

    A forecast's prediction is taken to err relatively as its residual does. What that adds to the next state, in units
    of that state, is summed over the forecasts between two full calls, since these err in one direction. The squares of
    such sums are added, as `place` adds those of steps. chain: one with residuals.
    """
    steps = len(schedule)
    if not LEAST_FULL <= calls <= steps:
        raise UsageError(f"{calls} full calls of {steps} steps; expected {LEAST_FULL} to {steps}.")
    errors = _forecast_errors(chain, schedule)
    # [a, b, c]: of all forecasts between the full calls b and c, extrapolated from a and b
    between = np.full((steps, steps, steps), np.inf)
    for b in range(steps):
        of_step = errors[b + 1 :, b, :b]
        between[b + 1 :, b, :b] = np.square(of_step[:, ::-1].cumsum(axis=1)[:, ::-1] - of_step)
    cost = np.full((steps, steps), np.inf)
    cost[-1, -2] = 0  # the first two calls are full
    *_, (reached, came) = _best_chains(cost, between, calls)
    reached[:, 1:] = np.inf  # and so is the last one
    return tuple(_cheapest(reached, came))


def _forecast_errors(chain: LongChain, schedule: Schedule) -> Float64:
    """Of the forecast at step c from full calls at the steps a and then b: (T, T, T), relative to the state after c."""
    times, energies = schedule.timesteps, np.square(chain.ends, dtype=np.float64).mean()
    known = [np.square(values, dtype=np.float64).mean(axis=tuple(range(1, values.ndim)))
             for values in (chain.states, chain.predictions)]  # fmt: skip
    states, predictions = (np.interp(times, chain.timesteps, values) for values in known)
    weights = schedule.error_weights * np.sqrt(predictions / np.append(energies, states[:-1]))
    products = chain.residual_products(times)
    square = np.diag(products)
    a, b, c = np.ogrid[: len(times), : len(times), : len(times)]
    change = square[c] - 2 * products[c, b] + square[b]  # |d_c - d_b|^2
    along = products[c, b] - products[c, a] - square[b] + products[b, a]  # <d_c - d_b, d_b - d_a>
    slope = square[b] - 2 * products[a, b] + square[a]  # |d_b - d_a|^2
    with np.errstate(divide="ignore", invalid="ignore"):  # where a and b are one step, which nobody asks for
        ratio = (times[c] - times[b]) / (times[b] - times[a])
        squared = np.maximum(0, change - 2 * ratio * along + ratio**2 * slope)
    found: Float64 = np.sqrt(squared / square[c]) * weights[c]
    return found


def _best_chains(cost: Float64, between: Float64, steps: int) -> Iterator[tuple[Float64, Sequence[NDArray[np.int64]]]]:
    """For chains of 2, 3, ... steps the least costs [h, i] of those whose last two places are h and i, and by step the
    place before h. cost: of chains of two; between: what the place j adds to a chain that ends with h, i: [h, i, j]."""
    came: list[NDArray[np.int64]] = []
    yield cost, came
    for _ in range(steps - 2):
        total = cost[:, :, None] + between
        came.append(total.argmin(axis=0))
        cost = total.min(axis=0)
        yield cost, came


def _cheapest(cost: Float64, came: Sequence[NDArray[np.int64]]) -> list[int]:
    """The places of the cheapest chain, ascending. cost: by the last two places, [h, i]; came: by step, the place
    before h of the best chain whose last two are h and i."""
    h, i = map(int, np.unravel_index(np.argmin(cost), cost.shape))
    found = [i, h]
    for before in reversed(came):
        i, h = h, int(before[h, i])
        found.append(h)
    return found


class _Errors:
    """Local errors of one sampler along a long chain."""

    def __init__(self, chain: LongChain, process: Diffusion | Flow, sampler: str) -> None:
        self.process, self.timesteps = process, chain.timesteps
        self.schedule = find_samplers()[sampler].schedule
        self.products = chain.products()
        self.states = np.append(np.diag(self.products)[: len(self.timesteps)], self.products[-1, -1])  # energies

    def of(self, places: tuple[int, ...], to: int | None) -> float:
        """Of the step from places[0], after one from places[1], to the place `to`, or to the data if None: squared,
        relative to the state there."""
        ascending = [*(() if to is None else (to,)), *places]
        table, count = self.schedule(self.process, self.timesteps[ascending]), len(self.timesteps)
        row, target = (0, 2 * count) if to is None else (1, to)
        known = min(table.lag + 1, len(places))
        at = [target, *places[:known], *(count + place for place in places[:known])]
        weights = np.concatenate([[-1], table.state_weights[row, :known], table.output_weights[row, :known]])
        return max(0.0, float(weights @ self.products[np.ix_(at, at)] @ weights)) / float(
            self.states[-1 if to is None else to]
        )
