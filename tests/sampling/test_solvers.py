"""Solvers of several steps: against diffusers' schedulers, and against the exact end of a chain for Gaussian data."""

import diffusers
import numpy as np
import pytest
import torch

from tqdit.errors import UsageError
from tqdit.sampling.process import Diffusion, Flow
from tqdit.sampling.schedule import SamplingSpec, samplers_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")  # arrays of their tensors
RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(3, 3)) / 5
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SOLVERS = ["deis", "dpm++2m", "heun", "unipc"]
FLOW_SOLVERS = ["dpm++2m", "heun", "unipc"]


def network(x, timestep):
    """Predictions that depend on state and timestep, and not linearly."""
    return 0.9 * np.tanh(x @ MIX + timestep / 1000) + 0.3 * x


def run(schedule, predict, x, noise=None):
    """All states of a chain by its table, in float64, from the first to the last."""
    states, outputs, found = [], [], []
    for step in reversed(range(len(schedule))):
        states.insert(0, x)
        outputs.insert(0, predict(schedule.input_scale[step] * x, schedule.timesteps[step]))
        known = range(min(len(states), schedule.lag + 1))
        x = sum(
            schedule.state_weights[step, j] * states[j] + schedule.output_weights[step, j] * outputs[j] for j in known
        )
        if noise is not None:
            x = x + schedule.noise_weight[step] * noise[step]
        found.append(x)
    return found


def run_theirs(scheduler, x, noise=None):
    found = []
    for number, t in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(torch.from_numpy(x), t).numpy(), float(t))
        more = {} if noise is None else {"variance_noise": torch.from_numpy(noise[-1 - number])}
        x = scheduler.step(torch.from_numpy(output), t, torch.from_numpy(x), **more).prev_sample.numpy()
        found.append(x)
    return found


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20, 50])
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [("dpm++2m", diffusers.DPMSolverMultistepScheduler), ("unipc", diffusers.UniPCMultistepScheduler)],
)
def test_chains_equal_those_of_diffusers(sampler, scheduler, steps, spacing):
    """To what their float32 table leaves: 1e-5 of states that grow to 250."""
    theirs = scheduler(**LINEAR, timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    schedule = SamplingSpec(Diffusion(spacing=spacing), sampler, steps).schedule
    assert schedule.timesteps[::-1].tolist() == theirs.timesteps.tolist()
    x = RNG.normal(size=(5, 3))
    for ours, expected in zip(run(schedule, network, x), run_theirs(theirs, x), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 20])
def test_a_stochastic_chain_equals_that_of_diffusers(steps):
    theirs = diffusers.DPMSolverMultistepScheduler(**LINEAR, algorithm_type="sde-dpmsolver++")
    theirs.set_timesteps(steps)
    schedule = SamplingSpec(Diffusion(), "dpm++2m-sde", steps).schedule
    x, noise = RNG.normal(size=(5, 3)), RNG.normal(size=(steps, 5, 3))
    for ours, expected in zip(run(schedule, network, x, noise), run_theirs(theirs, x, noise), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("steps", [8, 20])
def test_deis_equals_diffusers_but_for_its_last_step(steps):
    """Theirs ends at timestep 0, which has a little noise left; ours ends at the data."""
    theirs = diffusers.DEISMultistepScheduler(**LINEAR)
    theirs.set_timesteps(steps)
    x = RNG.normal(size=(5, 3))
    ours = run(SamplingSpec(Diffusion(), "deis", steps).schedule, network, x)
    for found, expected in zip(ours[:-1], run_theirs(theirs, x)[:-1], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 9, 21])
def test_heun_equals_diffusers(steps):
    schedule = SamplingSpec(Diffusion(), "heun", steps).schedule
    timesteps = schedule.timesteps[::-1]
    theirs = diffusers.HeunDiscreteScheduler(**LINEAR)
    theirs.set_timesteps(timesteps=sorted(set(timesteps.tolist()), reverse=True))
    assert timesteps.tolist() == theirs.timesteps.tolist()
    x, sigma = RNG.normal(size=(5, 3)), float(theirs.sigmas[0])
    ours = run(schedule, network, x / np.sqrt(sigma**2 + 1))[-1]
    np.testing.assert_allclose(ours, run_theirs(theirs, x)[-1], rtol=1e-5, atol=1e-4)


# Data of N(MEAN, SPREAD^2): the deterministic chain's end is known, and so is the best prediction.
MEAN, SPREAD = 0.7, 0.3


def best(process):
    def predict(x, timestep):
        a, b = process.mix(np.array([timestep]))
        noise = b * (x - a * MEAN) / (a**2 * SPREAD**2 + b**2)
        return (
            noise
            if isinstance(process, Diffusion)
            else noise - (x - b * noise) / np.maximum(a, 1e-9) * (a > 0) - (MEAN * (a == 0))
        )

    return predict


def exact_end(process, schedule, x):
    a, b = process.mix(schedule.timesteps[-1:])
    return MEAN + SPREAD * (x - a * MEAN) / np.sqrt(a**2 * SPREAD**2 + b**2)


EXACT = [(Diffusion(), name) for name in SOLVERS]
EXACT += [(Flow(shift=shift), name) for shift in (1.0, 3.0) for name in FLOW_SOLVERS]


@pytest.mark.parametrize("sampler", samplers_of(Flow()))
def test_a_flow_whose_network_predicts_the_opposite_has_the_same_chain(sampler):
    """x_0 - noise in place of noise - x_0."""
    ours, other = (SamplingSpec(Flow(shift=3.0, sign=sign), sampler, 6).schedule for sign in (1, -1))
    np.testing.assert_allclose(other.output_weights, -ours.output_weights, rtol=1e-12)
    np.testing.assert_allclose(other.state_weights, ours.state_weights, rtol=1e-12)


@pytest.mark.parametrize(("process", "sampler"), EXACT, ids=str)
def test_a_solver_is_of_second_order(process, sampler):
    """Sixteen times the calls leave less than a thirtieth of its error; of a first-order solver's, a sixteenth."""
    x = np.random.default_rng(3).normal(size=(100, 1))

    def error(name, steps):
        schedule = SamplingSpec(process, name, steps).schedule
        return np.abs(run(schedule, best(process), x)[-1] - exact_end(process, schedule, x)).max()

    assert error(sampler, 160) < error(sampler, 10) / 30
    assert error(sampler, 80) < error("ddim" if isinstance(process, Diffusion) else "euler", 80)


@pytest.mark.parametrize("process", [Diffusion(), Flow(shift=3.0)], ids=str)
def test_stochastic_chains_end_with_the_spread_of_the_data(process):
    schedule = SamplingSpec(process, "dpm++2m-sde", 100).schedule
    assert schedule.is_stochastic
    assert schedule.noise_weight[0] == 0
    noise = RNG.normal(size=(100, 20_000, 1))
    found = run(schedule, best(process), RNG.normal(size=(20_000, 1)), noise)[-1]
    assert found.mean() == pytest.approx(MEAN, abs=0.01)
    assert found.std() == pytest.approx(SPREAD, rel=0.06)  # steps of finite length leave 4 %


@pytest.mark.parametrize("steps", range(1, 12))
@pytest.mark.parametrize("sampler", SOLVERS)
def test_a_step_is_one_call_and_the_last_one_is_noisy(sampler, steps):
    schedule = SamplingSpec(Diffusion(), sampler, steps).schedule
    assert len(schedule) == steps
    assert schedule.timesteps[0] > 0
    assert np.all(np.diff(schedule.timesteps) >= 0)


def test_more_steps_than_noisy_timesteps_are_refused():
    with pytest.raises(UsageError, match=r"1000.*999"):
        SamplingSpec(Diffusion(), "dpm++2m", 1000)
