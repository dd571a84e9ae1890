"""Where the steps of a short chain lie: published spacings, and the best places for one model.

A short chain's step from timestep i to j, after one from h, ends beside the state that a long chain reaches at j. These
local errors are inner products of the long chain's states and predictions, so dynamic programming over the pairs
(h, i), (i, j) finds the places with the least sum of them. The idea of choosing steps by the solver's own error is that
of Align Your Steps (arXiv 2404.14507); errors of stored chains in place of a bound, and the dynamic programme, are as
in arXiv 2106.03802.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import UsageError
from tqdit.sampling.chains import Chains, Network
from tqdit.sampling.process import TRAINING_STEPS, Diffusion, Float64, Flow
from tqdit.sampling.schedule import find_samplers

Float32 = NDArray[np.float32]
KEPT = ("states", "predictions")  # of a long chain
LONG = ("dpm++2m", 100)  # sampler and steps of a long chain
LEARNED, STRIDE = 8, 2  # chains by which steps are placed, and every which of their timesteps can become a step
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
    """

    timesteps: Float64
    states: Float32
    predictions: Float32
    ends: Float32

    @classmethod
    def follow(
        cls, chains: Chains, network: Network, timesteps: Float64,
        after: Callable[[int, Mapping[str, Float32]], object], kept: Mapping[str, Float32] | None = None,
    ) -> LongChain:  # fmt: skip
        """Run chains that all stand at one step to their ends. kept: the states and predictions of earlier steps.

        after: called with every step that is done and all states and predictions so far. Raises SamplingError if a
        chain becomes NaN or infinite.
        """
        shape = (len(timesteps), *chains.x.shape)
        kept = kept or {name: np.zeros(shape, np.float32) for name in KEPT}
        while (step := chains.step_of(0)) >= 0:
            kept["states"][step] = chains.x
            finite = chains.advance(network(chains.inputs()))
            if not finite.all():
                raise chains.failure(int(np.flatnonzero(~finite)[0]))
            kept["predictions"][step] = chains.prediction
            after(step, kept)
        return cls(timesteps, kept["states"], kept["predictions"], chains.x.copy())

    def part(self, chains: int, stride: int) -> LongChain:
        """The first chains, and every `stride`th timestep, the highest among them."""
        every = slice((len(self.timesteps) - 1) % stride, None, stride)
        return LongChain(
            self.timesteps[every], self.states[every, :chains], self.predictions[every, :chains], self.ends[:chains]
        )

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
    came: list[NDArray[np.int64]] = []
    found: dict[int, tuple[float, ...]] = {}
    for steps in range(2, max(counts) + 1):
        if steps in counts:
            found[steps] = tuple(chain.timesteps[_cheapest(cost + last, came)].tolist())
        total = cost[:, :, None] + between
        came.append(total.argmin(axis=0))
        cost = total.min(axis=0)
    return found


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
