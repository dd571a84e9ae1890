"""The sampler's arithmetic against the papers' formulas and against diffusers' schedulers."""

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tqdit.diffusion import (
    SamplingSpec,
    Schedule,
    ddim_step,
    ddpm_step,
    guide,
    space_timesteps,
    step_coefficients,
)

from tqdit.errors import UsageError

RNG = np.random.default_rng(0)


def test_training_chain_is_linear_betas_of_ddpm():
    schedule = SamplingSpec(steps=1000).schedule
    betas = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-10)
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-12)


@given(st.integers(1, 1000))
def test_any_number_of_steps_gives_increasing_timesteps_that_end_at_999(steps):
    timesteps = space_timesteps(steps)
    assert len(timesteps) == steps
    assert (np.diff(timesteps) > 0).all()
    assert timesteps[0] == 0
    assert steps == 1 or timesteps[-1] == 999


def test_published_timesteps_of_250_and_100_and_50_steps():
    assert space_timesteps(250)[[0, 1, 2, -2, -1]].tolist() == [0, 4, 8, 995, 999]
    assert space_timesteps(100)[[0, 1, -2, -1]].tolist() == [0, 10, 989, 999]
    assert space_timesteps(50)[[0, 1, 2, -1]].tolist() == [0, 20, 41, 999]


@given(st.integers(2, 1000))
def test_respacing_keeps_the_marginals_of_the_training_chain(steps):
    schedule = SamplingSpec(steps=steps).schedule
    np.testing.assert_allclose(np.cumprod(1 - schedule.betas), schedule.alphas_cumprod, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 20, 250, 1000])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_folded_coefficients_equal_the_published_step(steps, sampler):
    """x' = from_x x + from_eps eps + ... is what the step graph computes; float64, so only rounding may differ."""
    schedule = SamplingSpec(steps=steps).schedule
    x, eps, v, noise = RNG.standard_normal((4, steps, 3, 2, 2))
    step = np.arange(steps)
    table = step_coefficients(schedule, sampler)
    column = (-1, 1, 1, 1)
    folded = table.from_x.reshape(column) * x + table.from_eps.reshape(column) * eps
    output = np.concatenate([eps, v], axis=1)
    if sampler == "ddim":
        expected = ddim_step(schedule, x, output, step)
    else:
        low, high = table.min_log_variance.reshape(column), table.max_log_variance.reshape(column)
        log_variance = low + (v + 1) / 2 * (high - low)
        folded = folded + table.noise_mask.reshape(column) * np.exp(log_variance / 2) * noise
        expected = ddpm_step(schedule, x, output, step, noise)
    np.testing.assert_allclose(folded, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [10, 50, 250])
def test_ddim_equals_diffusers(steps):
    theirs = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
    theirs.set_timesteps(steps)
    spec = SamplingSpec(steps=steps, sampler="ddim", spacing="leading")
    assert theirs.timesteps.tolist() == spec.schedule.timesteps[::-1].tolist()
    for step in (steps - 1, steps // 2, 0):
        x, eps = RNG.standard_normal((2, 1, 3, 4, 4))
        expected = theirs.step(
            torch.from_numpy(eps), int(spec.schedule.timesteps[step]), torch.from_numpy(x)
        ).prev_sample.numpy()
        ours = ddim_step(spec.schedule, x, eps, np.array([step]))
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)  # diffusers keeps its table in float32


@pytest.mark.parametrize("steps", [10, 250])
def test_ddpm_with_learned_variance_equals_diffusers(steps):
    theirs = diffusers.DDPMScheduler(beta_schedule="linear", clip_sample=False, variance_type="learned_range")
    theirs.set_timesteps(steps)
    spec = SamplingSpec(steps=steps, spacing="leading")
    for step in (steps - 1, steps // 2, 1, 0):
        x, eps, v = RNG.standard_normal((3, 1, 3, 4, 4))
        output = np.concatenate([eps, v], axis=1)
        noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        expected = theirs.step(
            torch.from_numpy(output), int(spec.schedule.timesteps[step]), torch.from_numpy(x),
            generator=torch.Generator().manual_seed(step),
        ).prev_sample.numpy()  # fmt: skip
        ours = ddpm_step(spec.schedule, x, output, np.array([step]), noise.numpy())
        np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-4)


def test_the_last_step_adds_no_noise():
    schedule = SamplingSpec(steps=10).schedule
    x, eps, v = RNG.standard_normal((3, 2, 3, 2, 2))
    output = np.concatenate([eps, v], axis=1)
    quiet = ddpm_step(schedule, x, output, np.array([0, 0]), np.zeros_like(x))
    loud = ddpm_step(schedule, x, output, np.array([0, 0]), np.full_like(x, 9.0))
    np.testing.assert_array_equal(quiet, loud)


def test_a_perfect_noise_prediction_ends_at_the_image():
    """With the true eps, DDIM lands on x_0 exactly, from any number of steps."""
    schedule = SamplingSpec(steps=17, sampler="ddim").schedule
    x0, eps = RNG.standard_normal((2, 1, 3, 2, 2))
    x = np.sqrt(schedule.alphas_cumprod[-1]) * x0 + np.sqrt(1 - schedule.alphas_cumprod[-1]) * eps
    for step in reversed(range(17)):
        x = ddim_step(schedule, x, eps, np.array([step]))
    np.testing.assert_allclose(x, x0, rtol=1e-9, atol=1e-9)


def test_variance_fraction_interpolates_between_posterior_and_beta():
    schedule = SamplingSpec(steps=100).schedule
    x = np.zeros((2, 1, 1, 1))
    noise, step = np.ones_like(x), np.array([50, 50])
    output = np.concatenate([np.zeros_like(x), np.array([-1.0, 1.0]).reshape(2, 1, 1, 1)], axis=1)
    low, high = ddpm_step(schedule, x, output, step, noise).ravel() ** 2
    assert low == pytest.approx(schedule.posterior_variance[50])
    assert high == pytest.approx(schedule.betas[50])


def test_guidance_moves_only_the_guided_channels():
    c, u = RNG.standard_normal((2, 2, 8, 2, 2))
    scale = np.array([4.0, 1.0])
    guided = guide(c, u, scale, 3)
    np.testing.assert_allclose(guided[0, :3], u[0, :3] + 4 * (c[0, :3] - u[0, :3]))
    np.testing.assert_allclose(guided[1], c[1])
    np.testing.assert_array_equal(guided[:, 3:], c[:, 3:])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"steps": 1001}, "1 to 1000"),
        ({"sampler": "euler"}, "unknown sampler 'euler'"),
        ({"spacing": "trailing"}, "unknown timestep spacing 'trailing'"),
        ({"beta_schedule": "cosine"}, "unknown beta schedule 'cosine'"),
    ],
)
def test_an_impossible_spec_is_refused(values, message):
    with pytest.raises(UsageError, match=message):
        SamplingSpec(**values)


def test_an_offset_beyond_the_training_chain_is_refused():
    with pytest.raises(UsageError, match="beyond 999"):
        Schedule(space_timesteps(1000, "leading", offset=1), np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))


def test_a_spec_survives_json():
    spec = SamplingSpec(steps=7, sampler="ddim", spacing="leading", guided_channels=3)
    assert SamplingSpec.from_json(spec.to_json()) == spec
