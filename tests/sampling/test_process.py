"""Timesteps and mixtures of the processes."""

import diffusers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from tqdit.errors import UsageError
from tqdit.sampling.process import Diffusion, Flow

STEPS = st.integers(1, 1000)


def test_the_training_chain_has_the_linear_betas_of_ddpm():
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(Diffusion().alphas_cumprod, expected, rtol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_betas_are_those_of_diffusers(schedule):
    theirs = diffusers.DDIMScheduler(beta_schedule=schedule, beta_start=0.00085, beta_end=0.012)
    ours = Diffusion(beta_schedule=schedule, beta_start=0.00085, beta_end=0.012)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-4)  # theirs is float32


@given(STEPS)
def test_timesteps_of_any_number_of_steps_increase_from_0_to_999(steps):
    timesteps = Diffusion().timesteps(steps)
    assert len(timesteps) == steps
    assert (np.diff(timesteps) > 0).all()
    assert timesteps[0] == 0
    assert steps == 1 or timesteps[-1] == 999
    np.testing.assert_array_equal(timesteps, reference.timesteps(steps))


def test_published_timesteps_of_250_and_100_and_50_steps():
    timesteps = Diffusion().timesteps
    assert timesteps(250)[[0, 1, 2, -2, -1]].tolist() == [0, 4, 8, 995, 999]
    assert timesteps(100)[[0, 1, -2, -1]].tolist() == [0, 10, 989, 999]
    assert timesteps(50)[[0, 1, 2, -1]].tolist() == [0, 20, 41, 999]


@pytest.mark.parametrize("steps", [10, 50, 250])
def test_leading_timesteps_are_those_of_diffusers(steps):
    theirs = diffusers.DDIMScheduler(steps_offset=1)
    theirs.set_timesteps(steps)
    ours = Diffusion(spacing="leading", steps_offset=1).timesteps(steps)
    assert theirs.timesteps.tolist() == ours[::-1].tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_timesteps_of_a_flow_are_those_of_diffusers(shift, steps):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.arange(steps, 0, -1) / steps)
    np.testing.assert_allclose(Flow(shift=shift).timesteps(steps)[::-1], theirs.timesteps.numpy(), rtol=1e-6)


@given(STEPS, st.floats(0.1, 10))
def test_timesteps_of_a_flow_increase_to_its_time_scale(steps, shift):
    timesteps = Flow(time_scale=7, shift=shift).timesteps(steps)
    assert (np.diff(timesteps, prepend=0) > 0).all()
    assert timesteps[-1] == pytest.approx(7)


@pytest.mark.parametrize("process", [Diffusion(), Flow()])
def test_a_state_turns_from_data_into_noise(process):
    a, b = process.mix(process.timesteps(250))
    assert (np.diff(a) < 0).all()
    assert (np.diff(b) > 0).all()
    assert a[0] > 0.99
    assert b[-1] > 0.99


def test_a_diffusion_keeps_the_variance_and_a_flow_mixes_linearly():
    a, b = Diffusion().mix(np.arange(1000.0))
    np.testing.assert_allclose(a**2 + b**2, 1)
    a, b = Flow().mix(np.array([0.0, 250.0, 1000.0]))
    assert (a.tolist(), b.tolist()) == ([1, 0.75, 0], [0, 0.25, 1])


def test_networks_learn_noise_or_velocity():
    x0, noise = np.array([1.0, 2.0]), np.array([5.0, 5.0])
    np.testing.assert_array_equal(Diffusion().target(x0, noise), noise)
    np.testing.assert_array_equal(Flow().target(x0, noise), [4, 3])


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Diffusion, {"spacing": "trailing"}, "'trailing'; known are linspace, leading"),
        (Diffusion, {"beta_schedule": "cosine"}, "'cosine'; known are linear, scaled_linear"),
        (Diffusion, {"beta_start": 0.0}, "betas from 0.0"),
        (Diffusion, {"beta_end": 1.0}, "to 1.0"),
        (Diffusion, {"steps_offset": 1000}, "steps_offset 1000"),
        (Flow, {"shift": 0.0}, "shift 0.0"),
        (Flow, {"time_scale": float("nan")}, "time scale nan"),
    ],
)
def test_an_impossible_process_is_refused(kind, values, message):
    with pytest.raises(UsageError, match=message):
        kind(**values)


@pytest.mark.parametrize("process", [Diffusion(), Diffusion(spacing="leading"), Flow()])
@pytest.mark.parametrize("steps", [0, 1001])
def test_a_chain_has_1_to_1000_steps(process, steps):
    with pytest.raises(UsageError, match=rf"^steps is {steps}; expected a whole number from 1 to 1000"):
        process.timesteps(steps)


def test_an_offset_beyond_the_training_chain_is_refused():
    with pytest.raises(UsageError, match="timestep is 1000, beyond 999"):
        Diffusion(spacing="leading", steps_offset=1).timesteps(1000)
