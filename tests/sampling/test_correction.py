"""PTQD's correction: what the loop makes of it, against its formulas, and that without one nothing changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import reference
from sampling.test_chains import DDPM, SCHEDULES, SHAPE, network, request, signature
from tqdit.errors import UsageError
from tqdit.sampling import noise
from tqdit.sampling.chains import Chains, run
from tqdit.sampling.correction import Correction
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.schedule import Schedule

TIMESTEPS = tuple(np.linspace(0, 999, 12).round().tolist())


def correction(scale: float = 1.5, deviation: float = 0.05) -> Correction:
    rng = np.random.default_rng(0)
    bias = tuple(map(tuple, rng.normal(0, 0.2, (12, 3)).tolist()))
    return Correction(TIMESTEPS, scale, tuple(rng.uniform(0, 0.3, 12).tolist()), bias, (deviation,) * 12)


def written_out(schedule: Schedule, found: Correction, row: int, seed: int) -> np.ndarray:
    """A chain without lag, in float64, by the formulas of the paper."""
    told = {name: np.asarray(value)[None] for name, value in request(row).items()}
    x = noise.normal(seed, row, noise.INITIAL, SHAPE).astype(np.float64)[None]
    for step in reversed(range(len(schedule))):
        t = schedule.timesteps[step]
        fed = {"x": x.astype(np.float32), "t": schedule.timesteps[step : step + 1]}
        output = network(fed | told).astype(np.float64)
        output = reference.guide(output, network(fed | told | {"label": np.array([5])}), 1.5, SHAPE[0])
        k = np.interp(t, found.timesteps, found.slope)
        b = np.array([np.interp(t, found.timesteps, each) for each in np.array(found.bias).T])
        eps = (output[:, : SHAPE[0]] - b[None, :, None, None]) / (1 + k)
        sigma = schedule.noise_weight[step]
        if schedule.log_variance is not None:
            low, high = (bound[step] for bound in schedule.log_variance)
            sigma = sigma * np.exp((low + (output[:, SHAPE[0] :] + 1) / 2 * (high - low)) / 2)
        c = schedule.output_weights[step, 0]
        sigma = np.sqrt(np.maximum(np.square(sigma) - c**2 * np.interp(t, found.timesteps, found.deviation) ** 2, 0))
        x = schedule.state_weights[step, 0] * x + c * eps + sigma * noise.normal(seed, row, step, SHAPE)
    return x[0]


@pytest.mark.parametrize("name", ["ddpm", "ddim", "fixed variance"])
@pytest.mark.parametrize("deviation", [0.0, 0.05, 5.0])  # of 5 no noise is left
def test_a_corrected_chain_follows_the_paper(name: str, deviation: float) -> None:
    found, schedule = correction(deviation=deviation), SCHEDULES[name]
    chains = Chains(signature(), Guidance(1.5), 2, found)
    for row in range(2):
        chains.add(schedule, request(row), 1.5, 9, row)
    done = run(chains, network)
    for row in range(2):
        expected = written_out(schedule, found, row, 9)
        np.testing.assert_allclose(done[row], expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_less_noise_is_drawn_where_errors_are_larger() -> None:
    spread = []
    for deviation in (0.0, 0.02, 5.0):
        found = replace_all(correction(), deviation)
        chains = Chains(signature(), Guidance(1.5), 40, found)
        for row in range(40):
            chains.add(DDPM.schedule, {"label": 0, "text": np.zeros(2, np.float32)}, 1.5, 0, row)
            chains.x[row] = 0
        chains.advance(network(chains.inputs()))
        spread.append(float(chains.x.std(axis=0).mean()))
    assert spread[0] > spread[1] > spread[2] == pytest.approx(0, abs=1e-6)


def replace_all(found: Correction, deviation: float) -> Correction:
    return Correction(found.timesteps, found.guidance_scale, found.slope, found.bias, (deviation,) * 12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_chains_of_another_guidance_scale_are_left_alone_bit_for_bit_beside_corrected_ones(name: str) -> None:
    alone = Chains(signature(), Guidance(1.5), 1)
    alone.add(SCHEDULES[name], request(1), 2.0, 3, 1)
    expected = run(alone, network)[0].copy()
    chains = Chains(signature(), Guidance(1.5), 3, correction())
    for row, scale in enumerate((1.5, 2.0, 1.5)):
        chains.add(SCHEDULES[name], request(row), scale, 3, row)
    found = run(chains, network)
    np.testing.assert_array_equal(found[1], expected)
    assert not np.array_equal(found[0], found[2])


def test_a_corrected_chain_does_not_depend_on_its_place_bit_for_bit() -> None:
    alone = Chains(signature(), Guidance(1.5), 1, correction())
    alone.add(DDPM.schedule, request(2), 1.5, 3, 2)
    expected = run(alone, network)[0].copy()
    chains = Chains(signature(), Guidance(1.5), 3, correction())
    chains.add(SCHEDULES["ddim"], request(0), 1.5, 3, 0)
    chains.add(SCHEDULES["lag"], request(1), 2.5, 3, 1)
    chains.add(DDPM.schedule, request(2), 1.5, 3, 2)
    chains.advance(network(chains.inputs()))
    chains.remove(0)  # the last one takes its place
    while chains.step_of(0) >= 0:
        if chains.count == 2 and chains.step_of(1) < 0:
            chains.remove(1)
        chains.advance(network(chains.inputs()))
    np.testing.assert_array_equal(chains.x[0], expected)


def test_steps_without_guidance_are_left_alone() -> None:
    schedule = SCHEDULES["interval"]
    rows = correction().of(schedule, 1.5)
    assert rows is not None
    changed = (rows != [1, 0, 0, 0, 0]).any(axis=1)
    np.testing.assert_array_equal(changed, schedule.guided)
    assert correction().of(schedule, 1.6) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"slope": (0.1,) * 11}, {"slope": (-0.1,) * 12}, {"deviation": (np.nan,) * 12}, {"bias": ((0.0,) * 3,) * 13},
        {"bias": (((0.0,) * 3,) * 11) + ((0.0,) * 2,)}, {"timesteps": TIMESTEPS[::-1]}, {"timesteps": ()},
        {"guidance_scale": np.inf}, {"bias": ((1e30,) * 3,) * 12}, {"deviation": (1e300,) * 12},
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(wrong: dict) -> None:
    found = correction()
    values = {name: getattr(found, name) for name in found.__struct_fields__} | wrong
    with pytest.raises(ValueError, match="a correction"):
        Correction(**values)


def test_biases_of_other_channels_are_refused() -> None:
    found = Correction(TIMESTEPS, 1.5, (0.0,) * 12, ((0.0,) * 4,) * 12, (0.0,) * 12)
    with pytest.raises(UsageError, match="4 channels, the state has 3"):
        Chains(signature(), Guidance(1.5), 1, found)


def test_without_a_known_error_a_schedule_is_what_it_was() -> None:
    zero = Correction(TIMESTEPS, 1.5, (0.0,) * 12, ((0.0,) * 3,) * 12, (0.0,) * 12)
    for schedule in (DDPM.schedule, replace(DDPM, steps=7).schedule):
        ends = []
        for each in (None, zero):
            chains = Chains(signature(), Guidance(1.5), 1, each)
            chains.add(schedule, request(0), 1.5, 0, 0)
            ends.append(run(chains, network).copy())
        np.testing.assert_array_equal(*ends)
