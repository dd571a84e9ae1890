"""Where the steps of a short chain lie, and which of its calls are full: published spacings, and what a long chain's
errors choose."""

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest

from sampling.toy import SIGNATURE, Toy, start
from support import few
from tqdit.errors import UsageError
from tqdit.sampling.placement import LongChain, dense, place, place_full, spacings
from tqdit.sampling.process import Diffusion, Flow, Recorded, Table
from tqdit.sampling.schedule import SamplingSpec, samplers_of

PROCESSES = [Diffusion(), Diffusion(spacing="leading", steps_offset=1), Flow(shift=3.0)]
LONG = 40
SPREADS = np.geomspace(0.05, 1, 6)
MEAN = np.linspace(-0.8, 0.8, 6)


def predict(process, x, timestep):
    """The best prediction for data of N(MEAN, SPREADS^2)."""
    a, b = process.mix(np.array([timestep]))
    noise = b * (x - a * MEAN) / (a**2 * SPREADS**2 + b**2)
    if isinstance(process, Diffusion):
        return noise
    return noise - MEAN - a * SPREADS**2 / (a**2 * SPREADS**2 + b**2) * (x - a * MEAN)


def exact_end(process, spec, count=24, seed=0):
    a, b = process.mix(spec.schedule.timesteps[-1:])
    start = np.random.default_rng(seed).normal(size=(count, 6))
    return MEAN + SPREADS / np.sqrt(a**2 * SPREADS**2 + b**2) * (start - a * MEAN)


def run(process, spec, count=24, seed=0):
    """A chain by its table in float64: states and predictions by step, and the end."""
    schedule = spec.schedule
    x = np.random.default_rng(seed).normal(size=(count, 6))
    states, outputs = np.zeros((2, len(schedule), count, 6))
    for step in reversed(range(len(schedule))):
        states[step], outputs[step] = x, predict(process, x, schedule.timesteps[step])
        ages = range(min(schedule.lag + 1, len(schedule) - step))
        x = sum(
            schedule.state_weights[step, age] * states[step + age]
            + schedule.output_weights[step, age] * outputs[step + age]
            for age in ages
        )
    return states, outputs, x


def long_chain(process, steps=LONG):
    spec = SamplingSpec(process, "dpm++2m", steps, dense(process, steps))
    return LongChain(spec.schedule.timesteps, *(array.astype(np.float32) for array in run(process, spec)))


@pytest.mark.parametrize("process", PROCESSES, ids=str)
@pytest.mark.parametrize("steps", [2, 12, 100])
def test_published_spacings_are_chains_from_noise_to_the_cleanest_timestep(process, steps):
    found = spacings(process, steps)
    assert found.pop("uniform") == ()
    for timesteps in [*found.values(), dense(process, steps)]:
        schedule = SamplingSpec(process, "dpm++2m", steps, timesteps).schedule
        assert schedule.timesteps.tolist() == list(timesteps)
        assert timesteps[-1] == (999 if isinstance(process, Diffusion) else 1000)
        assert timesteps[0] < 5
    assert np.median(found["log-snr"]) < np.median(found["karras"]) or steps == 2 or isinstance(process, Flow)


def test_karras_spacing_is_even_in_the_seventh_root_of_the_noise():
    a, b = Diffusion().mix(np.array(spacings(Diffusion(), 20)["karras"]))
    roots = (b / a) ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), (roots[-1] - roots[0]) / 19, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", few(["ddim", "dpm++2m", "unipc"], "dpm++2m"))
def test_placed_steps_err_less_than_published_ones(sampler):
    """On a network whose errors are known, and from noise that the search has not seen."""
    process = Diffusion()
    placed = place(long_chain(process), process, sampler, (8, 5))[8]
    assert placed[-1] == 999

    def error(timesteps):
        spec = SamplingSpec(process, sampler, 8, timesteps)
        return np.square(run(process, spec, seed=5)[2] - exact_end(process, spec, seed=5)).mean()

    assert error(placed) < min(map(error, spacings(process, 8).values())) / 1.3


@pytest.mark.slow
def test_a_flow_is_placed_too():
    process = Flow(shift=3.0)
    found = place(long_chain(process), process, "euler", (6,))[6]
    assert len(found) == 6
    assert found[-1] == 1000
    assert SamplingSpec(process, "euler", 6, found).schedule.timesteps.tolist() == list(found)


def test_the_best_places_are_those_of_the_least_sum_of_local_errors():
    """Against every choice of two steps below the first, for a sampler that looks at no earlier step."""
    process, chain = Diffusion(), long_chain(Diffusion(), 12)
    norms = [np.square(chain.states[at], dtype=np.float64).mean() for at in range(12)] + [np.square(chain.ends).mean()]

    def local(start, to):
        t = chain.timesteps[[*([] if to is None else [to]), start]]
        table = SamplingSpec(process, "ddim", len(t), tuple(t)).schedule
        x = table.state_weights[-1, 0] * chain.states[start] + table.output_weights[-1, 0] * chain.predictions[start]
        target = chain.ends if to is None else chain.states[to]
        relative = np.square(x - target).sum(1) / np.square(chain.ends).sum(1)
        return relative.mean() / (norms[12 if to is None else to])

    def cost(i, j):
        return local(11, i) + local(i, j) + local(j, None)

    found = place(chain, process, "ddim", (3,))[3]
    i, j = (int(np.flatnonzero(chain.timesteps == t)[0]) for t in (found[1], found[0]))
    # norms are of all images here, and of each image there: nearly the same
    assert cost(i, j) <= 1.02 * min(cost(i, j) for i in range(1, 11) for j in range(i))


def chain_with_residuals(steps=12, entries=30):
    """A long chain whose residuals wander smoothly, each image's by its own way."""
    chain = long_chain(Diffusion(), steps)
    t = chain.timesteps[:, None, None] / 1000
    phase, speed = np.random.default_rng(3).uniform(0, 6, (2, chain.states.shape[1], entries))
    return replace(chain, residuals=np.sin(phase + speed * t).astype(np.float32))


@pytest.mark.parametrize("calls", [4, 6, 8])
def test_full_calls_are_those_of_the_least_error_of_forecasts(calls):
    """Against every choice of them, each forecast written out."""
    chain = chain_with_residuals()
    at = [0, 1, 3, 4, 6, 8, 9, 11]  # timesteps of the long chain: nothing is interpolated
    schedule = SamplingSpec(Diffusion(), "ddim", 8, tuple(chain.timesteps[at])).schedule
    t, d = schedule.timesteps, chain.residuals[at].astype(np.float64)

    def energy(values):
        return np.square(values, dtype=np.float64).mean()

    def error(a, b, c):
        forecast = d[b] + (t[c] - t[b]) / (t[b] - t[a]) * (d[b] - d[a])
        prediction = energy(forecast - d[c]) / energy(d[c]) * energy(chain.predictions[at[c]])
        state = chain.ends if c == 0 else chain.states[at[c - 1]]
        return abs(schedule.output_weights[c, 0]) * np.sqrt(prediction / energy(state))

    def cost(full):
        known, total = [7, 6], 0.0
        for c in full:
            total += sum(error(*known[-2:], skipped) for skipped in range(c + 1, known[-1])) ** 2
            known.append(c)
        return total

    choices = [(*middle, 0) for middle in combinations(range(5, 0, -1), calls - 3)]
    least = min(map(cost, choices))
    full = place_full(chain, schedule, calls)
    assert len(full) == calls
    assert {0, 6, 7} <= set(full)
    assert all(a < b for a, b in pairwise(full))
    np.testing.assert_allclose(cost(full[-3::-1]), least, rtol=1e-6)


def test_residuals_that_move_evenly_are_forecast_exactly():
    """At any timesteps: those between two of the long chain are interpolated, as evenly."""
    chain = chain_with_residuals()
    moving = chain.timesteps[:, None, None] / 1000 * np.random.default_rng(4).normal(size=(1, 24, 30)) + 1
    chain = replace(chain, residuals=moving.astype(np.float32))
    schedule = SamplingSpec(Diffusion(), "dpm++2m", 20, spacings(Diffusion(), 20)["log-snr"]).schedule
    t, products = schedule.timesteps, chain.residual_products(schedule.timesteps)
    a, b, c = 19, 14, 3  # the full calls, and the forecast
    ratio = (t[c] - t[b]) / (t[b] - t[a])
    weights = np.zeros(20)
    weights[[a, b, c]] = ratio, -1 - ratio, 1
    assert weights @ products @ weights < 1e-8 * products[c, c]  # of float32 residuals
    wandering = chain_with_residuals().residual_products(schedule.timesteps)
    assert weights @ wandering @ weights > 1e-2 * wandering[c, c]


def test_a_long_chain_keeps_the_residuals_of_both_rows():
    spec = SamplingSpec(Diffusion(), "dpm++2m", 6)
    network, done = Toy(), []
    chain = LongChain.follow(
        start([spec, spec]), network, spec.schedule.timesteps, lambda step, _: done.append(step), residuals=True
    )
    assert done == [5, 4, 3, 2, 1, 0]
    np.testing.assert_array_equal(chain.ends, LongChain.follow(
        start([spec, spec]), network, spec.schedule.timesteps, lambda *_: None).ends)  # fmt: skip
    null = SIGNATURE.requests[0].null
    for step, image in ((5, 0), (2, 1)):
        rows = {"x": chain.states[step, [image, image]], "t": np.full(2, spec.schedule.timesteps[step]),
                "label": np.array([image, null])}  # fmt: skip
        expected = network.blocks(rows).ravel()
        # as a set: entries have no order
        np.testing.assert_allclose(np.sort(chain.residuals[step, image]), np.sort(expected), rtol=1e-6)


@pytest.mark.parametrize("calls", [2, 9])
def test_impossible_numbers_of_full_calls_are_refused(calls):
    schedule = SamplingSpec(Diffusion(), "ddim", 8).schedule
    with pytest.raises(UsageError, match=rf"{calls} full calls of 8 steps"):
        place_full(chain_with_residuals(), schedule, calls)


@pytest.mark.parametrize(
    ("sampler", "timesteps", "message"),
    [
        ("ddim", (3, 3, 9), "3, 3, 9.*3 ascending"),
        ("ddim", (3, 9, 1000), "whole numbers from 0 to 999"),
        ("ddim", (3.5, 9, 10), "3.5.*whole"),
        ("ddim", (3, 9), "chain of 3 steps"),
        ("heun", (3, 9, 10), "'heun'.*cannot be placed"),
    ],
)
def test_impossible_places_are_refused(sampler, timesteps, message):
    with pytest.raises(UsageError, match=message):
        SamplingSpec(Diffusion(), sampler, 3, timesteps)


def test_a_recorded_chain_keeps_its_steps():
    table = Table((100.0, 200.0), (1.0, 1.0), ((1.0,), (1.0,)), ((-0.1,), (-0.1,)), (0.0, 0.0), 1.0)
    process = Recorded("Euler", (table,))
    assert SamplingSpec(process, "recorded", 2).schedule.timesteps.tolist() == [100, 200]
    with pytest.raises(UsageError, match=r"Euler.*cannot be placed"):
        SamplingSpec(process, "recorded", 2, (50.0, 200.0))


@pytest.mark.parametrize("sampler", sorted(set(samplers_of(Diffusion())) - {"heun"}))
def test_steps_where_a_sampler_puts_them_are_its_own_chain(sampler):
    own = SamplingSpec(Diffusion(), sampler, 9).schedule
    placed = SamplingSpec(Diffusion(), sampler, 9, tuple(own.timesteps)).schedule
    np.testing.assert_array_equal(own.output_weights, placed.output_weights)
    np.testing.assert_array_equal(own.state_weights, placed.state_weights)


def test_placed_steps_stay_unless_another_chain_is_chosen():
    spec = SamplingSpec(Diffusion(), "dpm++2m", 3, (5.0, 300.0, 999.0))
    assert spec.choose() == spec == spec.choose(3, "dpm++2m")
    assert str(spec) == "3 placed steps of dpm++2m"
    for other in (spec.choose(4), spec.choose(sampler="ddim"), spec.choose(timesteps=())):
        assert other.timesteps == ()
    assert spec.choose(timesteps=[1, 999]) == SamplingSpec(Diffusion(), "dpm++2m", 2, (1.0, 999.0))
