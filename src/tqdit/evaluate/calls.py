"""Error and distance against network calls and seconds: one line per method, a sampler with a spacing of its steps.

Every chain begins with the same noise. The reference is the end of a long chain of the float engine, so the error of a
short chain is that of its solver and that of quantization. A stochastic sampler ends with other images than the
reference, so it has a distance alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.console import Console
from tqdit.engines.run.requests import Prompts
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.shards import SamplingJob
from tqdit.errors import UsageError
from tqdit.evaluate import chains
from tqdit.evaluate.bootstrap import Measure, of_mean
from tqdit.evaluate.chains import SampledChains
from tqdit.evaluate.evaluation import plain
from tqdit.evaluate.paired import relative_errors
from tqdit.ports import check_requests
from tqdit.sampling.chains import Chains
from tqdit.sampling.forecasts import LEAST_FULL
from tqdit.sampling.guidance import check_scale
from tqdit.sampling.placement import FIRST_IMAGE, LEARNED, LONG, MOST_PLACED, STRIDE, LongChain, dense, place, spacings
from tqdit.sampling.process import Diffusion, Flow
from tqdit.sampling.schedule import SamplingSpec, samplers_of

CONVERGED = ("dpm++2m", 200)  # sampler and steps of the reference
SPACED = ("dpm++2m", "unipc")  # samplers that are tried with every spacing; others with their own alone
_Methods = dict[tuple[str, str, int], SamplingSpec]  # by sampler, spacing and full calls
Distance = Callable[[SampledChains], Measure | None]  # of the pictures to a reference


@dataclass(frozen=True)
class Point:
    """Chains of one method with one number of calls."""

    sampler: str
    spacing: str
    calls: float  # `SamplingSpec.cost`
    timesteps: tuple[float, ...]
    error: Measure | None  # |x_0 - x_ref|^2 / |x_ref|^2, mean over images; None of a stochastic sampler
    error_median: float | None
    seconds: float  # of all images
    distance: Measure | None


def check_calls(card_sampling: SamplingSpec, counts: Sequence[int]) -> None:
    """Refuse what cannot be measured, before any work."""
    if card_sampling.process.noising is None:
        raise UsageError("--calls compares samplers, and this model keeps the one that it was recorded with.")
    if not counts or not all(2 <= count <= MOST_PLACED for count in counts):
        raise UsageError(f"--calls {','.join(map(str, counts))}: expected numbers from 2 to {MOST_PLACED}.")


def measure_calls(
    engine: Sampler, floating: Sampler, job: SamplingJob, counts: Sequence[int], console: Console,
    distance: Distance = lambda _: None, samplers: Sequence[str] = (), also: Sequence[tuple[str, int]] = (),
    prompts: Prompts | None = None,
) -> list[Point]:  # fmt: skip
    """Every method with every number of calls, each with the noise and the classes or prompts of `job`. floating: of
    the float model, which is the reference; of an engine with forecasts also chains of 2 N steps with N full calls, if
    `counts` has N and 2 N. samplers: those to try; (): all deterministic ones. also: samplers with a
    number of calls and their own spacing. prompts: those that the job was described with."""
    process = engine.card.sampling.process.noising
    assert process is not None
    methods = _methods(floating, job, counts, samplers or deterministic(process), console, prompts)
    methods |= {(sampler, "uniform", calls): SamplingSpec(process, sampler, calls) for sampler, calls in also}
    if engine.card.residual is not None and job.guidance_interval is None:
        methods |= _with_forecasts(methods)
    own = engine.card.sampling.choose(guidance_interval=job.guidance_interval)
    if own.timesteps:
        methods[own.sampler, "engine's own", own.calls] = own
    total = job.shards * (CONVERGED[1] + sum(spec.steps for spec in methods.values()))
    with console.bar(total, "calls", "steps") as bar:
        sampler, steps = CONVERGED
        long = _job(job, SamplingSpec(process, sampler, steps, dense(process, steps)))
        reference = chains.run(floating, long, bar.update, prompts).latents
        points = []
        for (name, spacing, _), spec in methods.items():
            made = chains.run(engine, _job(job, spec), bar.update, prompts)
            errors = None if spec.schedule.is_stochastic else relative_errors(reference, made.latents)
            mean, median = (None, None) if errors is None else (of_mean(errors), float(np.median(errors)))
            cost = spec.choose(guidance_interval=job.guidance_interval).cost
            points.append(Point(name, spacing, cost, spec.timesteps, mean, median, made.seconds, distance(made)))
    return points


def _job(job: SamplingJob, spec: SamplingSpec) -> SamplingJob:
    """The same images by another chain."""
    return replace(job, sampler=spec.sampler, steps=spec.steps, timesteps=spec.timesteps, full_calls=spec.full_calls)


def _with_forecasts(methods: _Methods) -> _Methods:
    """Of each sampler and spacing that is tried with N and with 2 N calls: 2 N steps of which N have full calls."""
    return {
        (sampler, f"{spacing}, forecasts", calls): methods[sampler, spacing, 2 * calls].choose(full_calls=calls)
        for sampler, spacing, calls in methods
        if sampler in SPACED and calls >= LEAST_FULL and (sampler, spacing, 2 * calls) in methods
    }


def deterministic(process: Diffusion | Flow) -> tuple[str, ...]:
    """The samplers whose chains end with the same image whenever they begin with the same noise."""
    names = samplers_of(process)
    return tuple(name for name in names if not SamplingSpec(process, name, 8).schedule.is_stochastic)


def _methods(
    floating: Sampler, job: SamplingJob, counts: Sequence[int], samplers: Sequence[str], console: Console,
    prompts: Prompts | None,
) -> _Methods:  # fmt: skip
    """The chains to run, of full calls alone."""
    process = floating.card.sampling.process.noising
    assert process is not None
    long = _long_chain(floating, job, process, console, prompts)
    found: _Methods = {}
    for sampler in samplers:
        placed = place(long, process, sampler, counts) if sampler in SPACED else None
        for calls in counts:
            every = {"uniform": ()} if placed is None else {**spacings(process, calls), "placed": placed[calls]}
            for spacing, timesteps in every.items():
                found[sampler, spacing, calls] = SamplingSpec(process, sampler, calls, timesteps)
    return found


def _long_chain(
    floating: Sampler, job: SamplingJob, process: Diffusion | Flow, console: Console, prompts: Prompts | None
) -> LongChain:
    """Chains from noise of their own, by which steps are placed."""
    card, (sampler, steps) = floating.card, LONG
    spec = SamplingSpec(process, sampler, steps, dense(process, steps))
    asked = replace(job, count=LEARNED, shard_size=LEARNED).requests(0, prompts)
    _, requests = check_requests(card.signature, asked)
    each = Chains(card.signature, card.guidance, LEARNED)
    for image in range(LEARNED):
        request = {name: values[image] for name, values in requests.items()}
        scale = check_scale(card.guidance, job.guidance_scale)
        each.add(spec.schedule, request, scale, job.seed, FIRST_IMAGE + image)
    with console.bar(steps, "placing steps", "steps") as bar:

        def after(step: int, kept: Mapping[str, NDArray[np.float32]]) -> None:
            bar.update()

        return LongChain.follow(each, floating.predict, spec.schedule.timesteps, after).part(LEARNED, STRIDE)


def to_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [
        {
            "sampler": point.sampler, "spacing": point.spacing, "calls": plain(point.calls),
            "timesteps": list(point.timesteps), "error": None if point.error is None else point.error.to_json(),
            "error_median": point.error_median,
            "seconds": point.seconds,
            "frechet_distance": None if point.distance is None else point.distance.to_json(),
        }
        for point in points
    ]  # fmt: skip
