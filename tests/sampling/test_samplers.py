"""The samplers' tables against the papers' formulas (`reference.py`) and against diffusers' schedulers."""

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from tqdit.errors import UsageError
from tqdit.sampling.process import Diffusion, Flow
from tqdit.sampling.schedule import SamplingSpec, Schedule, make_schedule, sampler_names, samplers_of

RNG = np.random.default_rng(0)
LEARNED = Diffusion(learned_variance=True)


def table_step(schedule, x, output, step, noise):
    """What the table of a sampler without lag says of one step, in float64."""
    prediction, fraction = output[:, : x.shape[1]], output[:, x.shape[1] :]
    sigma = schedule.noise_weight[step]
    if schedule.log_variance is not None:
        low, high = (bound[step] for bound in schedule.log_variance)
        sigma = sigma * np.exp((low + (fraction + 1) / 2 * (high - low)) / 2)
    return schedule.state_weights[step, 0] * x + schedule.output_weights[step, 0] * prediction + sigma * noise


@pytest.mark.parametrize("steps", [1, 2, 20, 250, 1000])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("process", [Diffusion(), LEARNED, Diffusion(spacing="leading", learned_variance=True)])
def test_every_step_of_a_table_is_the_published_one(steps, sampler, process):
    schedule = SamplingSpec(process, sampler, steps).schedule
    chain = reference.timesteps(steps, process.spacing)
    np.testing.assert_array_equal(schedule.timesteps, chain)
    for step in {0, 1, steps // 2, steps - 1} & set(range(steps)):
        x, eps, v, noise = RNG.standard_normal((4, 2, 3, 2, 2))
        output = np.concatenate([eps, v], axis=1) if process.learned_variance else eps
        if sampler == "ddim":
            expected = reference.ddim_step(chain, x, output, step)
        else:
            expected = reference.ddpm_step(chain, x, output, step, noise)
        np.testing.assert_allclose(table_step(schedule, x, output, step, noise), expected, rtol=1e-9, atol=1e-9)


@given(st.integers(2, 1000))
def test_a_respaced_ancestral_step_keeps_the_marginals_of_the_training_chain(steps):
    """From x_t with the true noise and the posterior variance to the mixture of the step before."""
    schedule = SamplingSpec(LEARNED, "ddpm", steps).schedule
    a, b = LEARNED.mix(schedule.timesteps)
    from_state, from_output = schedule.state_weights[:, 0], schedule.output_weights[:, 0]
    assert schedule.log_variance is not None
    variance = (from_state * b + from_output) ** 2 + np.exp(schedule.log_variance[0])
    np.testing.assert_allclose((from_state * a)[1:], a[:-1], rtol=1e-9)
    np.testing.assert_allclose(variance[1:], b[:-1] ** 2, rtol=1e-9)


@pytest.mark.parametrize("steps", [10, 50, 250])
def test_ddim_equals_diffusers(steps):
    theirs = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
    theirs.set_timesteps(steps)
    schedule = SamplingSpec(Diffusion(spacing="leading"), "ddim", steps).schedule
    assert theirs.timesteps.tolist() == schedule.timesteps[::-1].tolist()
    for step in (steps - 1, steps // 2, 0):
        x, eps = RNG.standard_normal((2, 1, 3, 4, 4))
        expected = theirs.step(
            torch.from_numpy(eps), int(schedule.timesteps[step]), torch.from_numpy(x)
        ).prev_sample.numpy()
        ours = table_step(schedule, x, eps, step, np.zeros_like(x))
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)  # diffusers keeps its table in float32


@pytest.mark.parametrize("steps", [10, 250])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_large"])
def test_ddpm_equals_diffusers(steps, variance):
    learned = variance == "learned_range"
    theirs = diffusers.DDPMScheduler(beta_schedule="linear", clip_sample=False, variance_type=variance)
    theirs.set_timesteps(steps)
    schedule = SamplingSpec(Diffusion(spacing="leading", learned_variance=learned), "ddpm", steps).schedule
    for step in (steps - 1, steps // 2, 1, 0):
        x, eps, v = RNG.standard_normal((3, 1, 3, 4, 4))
        output = np.concatenate([eps, v], axis=1) if learned else eps
        noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        expected = theirs.step(
            torch.from_numpy(output), int(schedule.timesteps[step]), torch.from_numpy(x),
            generator=torch.Generator().manual_seed(step),
        ).prev_sample.numpy()  # fmt: skip
        ours = table_step(schedule, x, output, step, noise.numpy())
        np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_equals_diffusers(shift):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.arange(12, 0, -1) / 12)
    schedule = SamplingSpec(Flow(shift=shift), "euler", 12).schedule
    x = RNG.standard_normal((1, 3, 4, 4))
    ours = x
    for step, timestep in zip(reversed(range(12)), theirs.timesteps, strict=True):
        velocity = RNG.standard_normal(x.shape)
        x = theirs.step(torch.from_numpy(velocity), timestep, torch.from_numpy(x)).prev_sample.numpy()
        ours = table_step(schedule, ours, velocity, step, np.zeros_like(x))
        np.testing.assert_allclose(ours, x, rtol=1e-5, atol=1e-5)


def test_the_last_step_adds_no_noise():
    for process in (Diffusion(), LEARNED):
        assert SamplingSpec(process, "ddpm", 10).schedule.noise_weight.astype(bool).tolist() == [False] + 9 * [True]
    assert not SamplingSpec(sampler="ddim", steps=10).schedule.is_stochastic


@pytest.mark.parametrize(("process", "sampler"), [(Diffusion(), "ddim"), (Flow(shift=3.0), "euler")])
def test_a_perfect_prediction_ends_at_the_data(process, sampler):
    """With the true target, a deterministic chain of any number of steps ends at x_0 exactly."""
    schedule = SamplingSpec(process, sampler, 17).schedule
    x0, noise = RNG.standard_normal((2, 1, 3, 2, 2))
    a, b = process.mix(schedule.timesteps[-1:])
    x = a * x0 + b * noise
    for step in reversed(range(17)):
        x = table_step(schedule, x, process.target(x0, noise), step, np.zeros_like(x))
    np.testing.assert_allclose(x, x0, rtol=1e-9, atol=1e-9)


def test_a_variance_fraction_interpolates_between_posterior_and_beta():
    abar, prev = (values[50] for values in reference.alphas_cumprod(reference.timesteps(100)))
    beta = 1 - abar / prev
    schedule = SamplingSpec(LEARNED, steps=100).schedule
    assert schedule.log_variance is not None
    low, high = (np.exp(bound[50]) for bound in schedule.log_variance)
    assert low == pytest.approx(beta * (1 - prev) / (1 - abar))
    assert high == pytest.approx(beta)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "^steps is 0"),
        ({"steps": 1001}, "1 to 1000"),
        ({"sampler": "karras"}, "'karras' is unknown.*known are ddim, ddpm"),
        ({"sampler": "euler"}, "'euler'.*known are ddim, ddpm"),
        ({"sampler": "ddim", "process": Flow()}, "'ddim'.*known are .*euler"),
    ],
)
def test_an_impossible_spec_is_refused(values, message):
    with pytest.raises(UsageError, match=message):
        SamplingSpec(**values)


def test_samplers_are_the_files_of_their_folder():
    diffusion = ("ddim", "ddpm", "deis", "dpm++2m", "dpm++2m-sde", "heun", "unipc")
    assert sorted(sampler_names()) == sorted([*diffusion, "euler", "recorded"])
    assert sorted(samplers_of(Diffusion())) == sorted(diffusion)
    assert sorted(samplers_of(Flow())) == ["dpm++2m", "dpm++2m-sde", "euler", "heun", "unipc"]


def test_a_new_sampler_is_one_file(tmp_path, monkeypatch):
    """Euler's method with steps half as long, found in a folder of its own."""
    from tqdit.sampling import samplers

    (tmp_path / "half.py").write_text(
        "import numpy as np\n"
        "from tqdit.sampling.process import Flow\n"
        "from tqdit.sampling.schedule import single_step\n"
        "PROCESS = Flow\n"
        "def schedule(process, timesteps):\n"
        "    return single_step(timesteps, np.ones_like(timesteps), -0.5 / len(timesteps) + 0 * timesteps)\n"
    )
    monkeypatch.setattr(samplers, "__path__", [*samplers.__path__, str(tmp_path)])
    spec = SamplingSpec(Flow(), "half", 4)
    assert spec.schedule.output_weights.ravel().tolist() == 4 * [-0.125]
    assert "half" in sampler_names()
    make_schedule.cache_clear()


@pytest.mark.parametrize("process", [Diffusion(spacing="leading", learned_variance=True), Flow(shift=3.0)])
def test_a_spec_survives_json(process):
    spec = SamplingSpec(process, samplers_of(process)[0], 7)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=SamplingSpec) == spec
    assert str(spec) == f"7 steps of {spec.sampler}"


def test_steps_and_sampler_are_chosen_one_by_one():
    spec = SamplingSpec(LEARNED, "ddpm", 250)
    assert spec.choose() == spec
    assert spec.choose(20) == SamplingSpec(LEARNED, "ddpm", 20)
    assert spec.choose(sampler="ddim") == SamplingSpec(LEARNED, "ddim", 250)
    with pytest.raises(UsageError, match=r"^steps is 0"):
        spec.choose(0)
    with pytest.raises(UsageError, match="sampler '' is unknown"):
        spec.choose(sampler="")


def test_a_table_that_looks_back_before_the_chain_is_refused():
    ones, early = np.ones(3), np.zeros((3, 2))
    early[:, 1] = [1, 1, 0]
    Schedule(np.arange(3.0), early, early, ones, ones)
    early[2, 1] = 1  # of the chain's first step
    with pytest.raises(ValueError, match="3 steps"):
        Schedule(np.arange(3.0), early, early, ones, ones)


def test_the_weight_of_an_error_is_that_of_the_prediction():
    schedule = SamplingSpec(Flow(), "euler", 4).schedule
    np.testing.assert_allclose(schedule.error_weights, 0.25)


@pytest.mark.parametrize(
    "chain",
    [{"timesteps": "abc"}, {"timesteps": [None]}, {"guidance_interval": 5}, {"guidance_interval": ("a", "b")}],
    ids=str,
)
def test_what_is_no_number_is_one_line(chain):
    with pytest.raises(UsageError, match="expected numbers"):
        SamplingSpec().choose(**chain)
