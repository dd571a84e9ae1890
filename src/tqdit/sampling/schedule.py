"""A sampling loop as a table, computed on the host; `chains` runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import UsageError
from tqdit.registry import find_modules
from tqdit.sampling import samplers
from tqdit.sampling.forecasts import check_full_calls, full_numbers, spread
from tqdit.sampling.process import NO_CHAIN, Diffusion, Float64, Flow, Process, Recorded, Unsampled, check_timesteps

MOST_LAG = 3
RECORDED = "recorded"  # the sampler that replays a recorded chain


@dataclass(frozen=True, eq=False)
class Schedule:
    """Step s computes, with x_j and out_j the state and the prediction of j steps before,

        x' = sum_j state_weights[s, j] x_j + output_weights[s, j] out_j + sigma noise, j = 0..L

    of the prediction at (input_scale[s] x_0, timesteps[s]). sigma is noise_weight[s], times exp(v / 2) with a learned
    log variance v = low + (fraction + 1) / 2 (high - low). Arrays are float64, (T,) or (T, L + 1), indexed by the step;
    the chain runs from step T-1 to 0 and begins with initial_scale times noise. Weights of predictions before the
    chain's first one are zero.
    """

    timesteps: Float64
    state_weights: Float64
    output_weights: Float64
    noise_weight: Float64
    input_scale: Float64
    log_variance: tuple[Float64, Float64] | None = None  # low and high
    initial_scale: float = 1.0
    guided: NDArray[np.bool_] | None = None  # (T,): whether a step computes the unconditional row; None: each does
    full: NDArray[np.bool_] | None = None  # (T,): whether a step's call is full, or else a forecast; None: each is full

    def __post_init__(self) -> None:
        arrays = (self.state_weights, self.output_weights)
        steps, lag = len(self.timesteps), self.lag
        ages = np.arange(lag + 1)[None] > np.arange(steps)[::-1][:, None]  # of predictions that are not there yet
        if lag > MOST_LAG or any(array.shape != (steps, lag + 1) or np.any(array[ages]) for array in arrays):
            raise ValueError(f"weights of shapes {[array.shape for array in arrays]} for {steps} steps")
        numbers = (self.timesteps, *arrays, self.noise_weight, self.input_scale, np.float64(self.initial_scale))
        if not len(self.noise_weight) == len(self.input_scale) == steps or not all(
            np.isfinite(array).all() for array in numbers
        ):
            raise ValueError(f"a table of {steps} steps; expected as many finite numbers of each kind")

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def lag(self) -> int:
        """L: how many earlier steps an update looks back at."""
        return int(self.state_weights.shape[1]) - 1

    @property
    def is_stochastic(self) -> bool:
        return bool(np.any(self.noise_weight))

    @property
    def error_weights(self) -> Float64:
        """The factor with which an error of the prediction enters the next state, (T,)."""
        return np.abs(self.output_weights[:, 0])


def single_step(
    timesteps: Float64, from_state: Float64, from_output: Float64, noise_weight: Float64 | None = None,
    log_variance: tuple[Float64, Float64] | None = None,
) -> Schedule:  # fmt: skip
    """The table of a sampler that looks at no earlier step."""
    noise = np.zeros_like(from_state) if noise_weight is None else noise_weight
    return Schedule(timesteps, from_state[:, None], from_output[:, None], noise, np.ones_like(from_state), log_variance)


class ChainArguments(TypedDict, total=False):
    """What a caller chooses of a chain. None, or left out: as the engine's card proposes.

    timesteps: where the steps lie, ascending; None: where the card places them, if steps and sampler are those that it
    proposes, else where the sampler puts them, and so for (). guidance_interval: lowest and highest timestep with
    guidance (arXiv 2404.07724); outside, an image has one row of a call in place of two. full_calls: how many calls
    are full, or the steps of those; the others are forecasts (`forecasts`). None, or as many as the card's chain has:
    the card's, if nothing else of its chain changes. Else None means all, and a number is spread over the steps.
    """

    steps: int | None
    sampler: str | None
    timesteps: Sequence[float] | None
    guidance_interval: tuple[float, float] | None
    full_calls: int | Sequence[int] | None


@dataclass(frozen=True)
class SamplingSpec:
    """Everything that decides how a chain is computed, apart from the network. Travels inside the ONNX file."""

    process: Process = Diffusion()  # noqa: RUF009 (frozen)
    sampler: str = "ddpm"
    steps: int = 250
    timesteps: tuple[float, ...] = ()  # where the steps lie, ascending; empty: where the sampler puts them
    guidance_interval: tuple[float, float] | None = None  # timesteps with guidance, both ends included; None: all
    full_calls: tuple[int, ...] = ()  # steps with a full call, ascending; the others are forecasts. Empty: all are full

    def __post_init__(self) -> None:
        if isinstance(self.process, Unsampled):
            return
        known = samplers_of(self.process)
        if self.sampler not in known:
            raise UsageError(
                f"sampler '{self.sampler}' is unknown, or not one for this model; known are {', '.join(known)}."
            )
        if self.timesteps:
            check_timesteps(self.process, self.timesteps, self.steps)
        interval = self.guidance_interval
        if interval is not None and (len(interval) != 2 or not interval[0] <= interval[1]):
            found = ", ".join(f"{value:g}" for value in interval)
            raise UsageError(f"guidance interval ({found}); expected two timesteps, lower first.")
        if self.full_calls:
            check_full_calls(self.full_calls, self.steps)
            if interval is not None:
                raise UsageError(
                    "forecasts extrapolate both rows of an image, and outside a guidance interval it has one. Leave "
                    "the guidance interval or the full calls out."
                )
        _ = self.schedule  # which knows what fits together

    @property
    def schedule(self) -> Schedule:
        """Raises UsageError if no chain is known."""
        if isinstance(self.process, Unsampled):
            raise UsageError(NO_CHAIN)
        return make_schedule(self)

    def choose(
        self, steps: int | None = None, sampler: str | None = None, timesteps: Sequence[float] | None = None,
        guidance_interval: tuple[float, float] | None = None, full_calls: int | Sequence[int] | None = None,
    ) -> SamplingSpec:  # fmt: skip
        """With what is given of another chain: `ChainArguments`.

        timesteps and full_calls are those of this chain if nothing else of it changes, else where the sampler puts
        them, and all; so many full calls as this chain has are its own, too, others evenly spread (`forecasts.spread`).
        """
        placed = None if timesteps is None else _numbers("timesteps", timesteps)
        if steps is None and sampler == RECORDED != self.sampler and isinstance(self.process, Recorded):
            steps = len(self.process.tables[0].timesteps)
        steps = (len(placed) if placed else self.steps) if steps is None else steps
        sampler = self.sampler if sampler is None else sampler
        if placed is None:
            placed = self.timesteps if (steps, sampler) == (self.steps, self.sampler) else ()
        interval: Any = self.guidance_interval
        if guidance_interval is not None:
            interval = _numbers("guidance interval", guidance_interval)
        same = (steps, sampler, placed) == (self.steps, self.sampler, self.timesteps) and guidance_interval is None
        if full_calls is None:
            full_calls = self.full_calls if same else ()
        elif isinstance(full_calls, int | np.integer):
            as_now = same and full_calls == len(self.full_calls)
            full_calls = self.full_calls if as_now else spread(steps, int(full_calls))
        full = full_numbers(full_calls)
        return replace(
            self, steps=steps, sampler=sampler, timesteps=placed, guidance_interval=interval,
            full_calls=full if len(full) < steps else (),
        )  # fmt: skip

    @property
    def calls(self) -> int:
        """Full calls of the chain."""
        return len(self.full_calls) or self.steps

    @property
    def cost(self) -> float:
        """Calls that an image costs: a forecast none, a step outside the guidance interval, with one row, a half."""
        guided = self.schedule.guided
        return self.calls if guided is None else (self.steps + int(guided.sum())) / 2

    def __str__(self) -> str:
        """'250 steps of ddpm', '12 placed steps of dpm++2m', or by the scheduler that was recorded."""
        if isinstance(self.process, Unsampled):
            return "no chain"
        name = self.sampler
        if isinstance(self.process, Recorded) and name == RECORDED:
            name = self.process.scheduler
        interval = self.guidance_interval
        guided = "" if interval is None else f" with guidance from timestep {interval[0]:g} to {interval[1]:g}"
        forecast = f", {self.calls} of them with full calls" if self.full_calls else ""
        return f"{self.steps}{' placed' * bool(self.timesteps)} steps of {name}{forecast}{guided}"


def arguments_of(described: object) -> ChainArguments:
    """What `choose` takes to come to the chain of a spec, or of anything with attributes of these names."""
    return cast(ChainArguments, {name: getattr(described, name) for name in ChainArguments.__annotations__})


def _numbers(what: str, values: Sequence[float]) -> tuple[float, ...]:
    try:
        return tuple(map(float, values))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} {values!s:.60}; expected numbers.") from error


@lru_cache(maxsize=256)
def make_schedule(spec: SamplingSpec) -> Schedule:
    module = find_samplers()[spec.sampler]
    process = spec.process if isinstance(spec.process, module.PROCESS) else spec.process.noising
    assert isinstance(process, module.PROCESS)
    timesteps = np.array(spec.timesteps) if spec.timesteps else visits(module, process, spec.steps)
    schedule: Schedule = module.schedule(process, timesteps)
    if spec.full_calls:
        full = np.isin(np.arange(spec.steps), spec.full_calls)
        if not np.all(np.diff(schedule.timesteps)):
            raise UsageError(
                f"full calls of {spec.sampler}, which visits a timestep twice and so has no forecasts. Leave them out."
            )
        return replace(schedule, full=full)
    if spec.guidance_interval is None:
        return schedule
    low, high = spec.guidance_interval
    return replace(schedule, guided=(low <= schedule.timesteps) & (schedule.timesteps <= high))


def visits(module: ModuleType, process: Diffusion | Flow | Recorded, steps: int) -> Float64:
    """The timesteps of a chain of T steps, ascending, (T,), unless they are placed."""
    found: Float64 = module.visits(process, steps) if hasattr(module, "visits") else process.timesteps(steps)
    return found


def find_samplers() -> dict[str, ModuleType]:
    """By name: a file's `NAME`, or the name of the file."""
    return {getattr(module, "NAME", name): module for name, module in find_modules(samplers).items()}


def sampler_names() -> tuple[str, ...]:
    return tuple(find_samplers())


def samplers_of(process: Process) -> tuple[str, ...]:
    """Names of the samplers for a process: of a recorded one those of its noising, too."""
    kinds = (process, process.noising)
    return tuple(
        name for name, module in find_samplers().items() if any(isinstance(kind, module.PROCESS) for kind in kinds)
    )
