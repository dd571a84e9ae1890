"""Schedulers of diffusers as tables: the loop replays them."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from tqdit.errors import UsageError
from tqdit.models.scheduler import find_noising, tabulate
from tqdit.ports import Port, Signature
from tqdit.sampling import noise
from tqdit.sampling.chains import Chains, run
from tqdit.sampling.process import Diffusion, Flow, Recorded
from tqdit.sampling.schedule import SamplingSpec, samplers_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")

STEPS = 20
SHAPE = (2, 4, 4)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
DETERMINISTIC = {
    "DDIM": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "DDIM, v": lambda: diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(),
    "Euler, Karras": lambda: diffusers.EulerDiscreteScheduler(use_karras_sigmas=True),
    "Heun": lambda: diffusers.HeunDiscreteScheduler(),
    "PNDM": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "IPNDM": lambda: diffusers.IPNDMScheduler(),
    "DEIS": lambda: diffusers.DEISMultistepScheduler(),
    "DPM++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(),
    "DPM++ 3M": lambda: diffusers.DPMSolverMultistepScheduler(solver_order=3),
    "DPM++ 2M, flow": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW),
    "DPM++ 2S": lambda: diffusers.DPMSolverSinglestepScheduler(),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(),
    "UniPC, order 3": lambda: diffusers.UniPCMultistepScheduler(solver_order=3),
    "UniPC, flow": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "flow Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow Heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
    "EDM Euler": lambda: diffusers.EDMEulerScheduler(),
    "EDM DPM++ 2M": lambda: diffusers.EDMDPMSolverMultistepScheduler(),
    "flow map Euler": lambda: diffusers.FlowMapEulerDiscreteScheduler(),
    "CogVideoX DDIM": lambda: diffusers.CogVideoXDDIMScheduler(clip_sample=False),
}
STOCHASTIC = {
    "DDPM": lambda: diffusers.DDPMScheduler(clip_sample=False),
    "Euler, ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "DPM++ 2M, SDE": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "LCM": lambda: diffusers.LCMScheduler(clip_sample=False),
    "SA": lambda: diffusers.SASolverScheduler(),
    "TCD": lambda: diffusers.TCDScheduler(),
}
SIGNATURE = Signature(
    (Port("x", "state", "float32", (None, *SHAPE)), Port("t", "time", "float32", (None,))), (None, *SHAPE), "nonlinear"
)


def network(x, t):
    return np.tanh(0.7 * x + np.reshape(t, (-1, 1, 1, 1)) / 1500) + 0.1 * x


def theirs(scheduler, x):
    """The chain of diffusers' own step."""
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        output = torch.from_numpy(network(scaled.numpy(), float(timestep)).astype(np.float32))
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
    return x.numpy()


def spec_of(scheduler):
    table = tabulate(scheduler)
    return SamplingSpec(Recorded("scheduler", (table,)), "recorded", len(table.timesteps))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_loop_replays_the_scheduler(name):
    """float32 over 20 steps: 1e-5 of the norm."""
    scheduler = DETERMINISTIC[name]()
    scheduler.set_timesteps(STEPS)
    spec = spec_of(scheduler)
    chains = Chains(SIGNATURE, None, 1)
    chains.add(spec.schedule, {}, 1.0, seed=3, image=0)
    start = torch.from_numpy(chains.x.copy())
    expected = theirs(scheduler, start)
    found = run(chains, lambda inputs: network(inputs["x"], inputs["t"]).astype(np.float32))
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_loop_replays_a_scheduler_with_the_same_noise(name, monkeypatch):
    scheduler = STOCHASTIC[name]()
    scheduler.set_timesteps(STEPS)
    spec = spec_of(scheduler)
    assert spec.schedule.is_stochastic

    def randn_tensor(shape, *_, **__):
        step = len(spec.schedule) - 1 - scheduler.step_index if hasattr(scheduler, "step_index") else drawn.pop()
        return torch.from_numpy(noise.normal(3, 0, step, shape))

    drawn = list(range(len(spec.schedule)))  # of DDPM, which counts no steps; each but the last draws once
    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", randn_tensor)
    chains = Chains(SIGNATURE, None, 1)
    chains.add(spec.schedule, {}, 1.0, seed=3, image=0)
    expected = theirs(scheduler, torch.from_numpy(chains.x.copy()))
    found = run(chains, lambda inputs: network(inputs["x"], inputs["t"]).astype(np.float32))
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_tabulating_leaves_the_scheduler_as_it_was():
    scheduler = diffusers.UniPCMultistepScheduler()
    scheduler.set_timesteps(STEPS)
    assert tabulate(scheduler) == tabulate(scheduler)
    assert scheduler.step_index is None


def test_noise_has_its_weight():
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    schedule = spec_of(scheduler).schedule
    assert schedule.is_stochastic
    assert schedule.noise_weight[0] == 0  # the last step


@pytest.mark.parametrize("settings", [{"clip_sample": True}, {"thresholding": True}], ids=lambda s: next(iter(s)))
def test_a_scheduler_that_is_not_linear_is_refused_with_its_residual(settings):
    scheduler = diffusers.DDIMScheduler(**{"clip_sample": False, **settings})
    scheduler.set_timesteps(STEPS)
    with pytest.raises(UsageError, match=r"DDIMScheduler.*residual \d"):
        tabulate(scheduler)


def test_a_scheduler_whose_step_takes_more_is_refused():
    """That of CogVideoX-5B takes two timesteps and what it predicted before."""
    scheduler = diffusers.CogVideoXDPMScheduler()
    scheduler.set_timesteps(STEPS)
    with pytest.raises(UsageError, match=r"CogVideoXDPMScheduler makes no step .*record its network alone"):
        tabulate(scheduler)


def test_a_flow_is_recognised_with_its_own_even_steps():
    """As Flux has it: even u, shifted by the size of the image; the network is told t in 0..1."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=1.15)
    table = tabulate(scheduler)
    found = find_noising(scheduler.config, table, (1e-3, 0.0), 1)
    assert found == Flow(1.0, found.shift)
    assert found.shift == pytest.approx(np.exp(1.15), rel=1e-5)
    np.testing.assert_allclose(found.timesteps(STEPS), 1e-3 * np.array(table.timesteps), rtol=1e-5)
    ours = SamplingSpec(found, "euler", STEPS).schedule
    for name in ("state_weights", "output_weights"):
        np.testing.assert_allclose(getattr(ours, name), getattr(table, name), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [("DDIM", "ddim"), ("DPM++ 2M", "dpm++2m"), ("UniPC", "unipc"), ("DEIS", "deis"), ("flow Euler", "euler"),
     ("DPM++ 2M, flow", "dpm++2m"), ("UniPC, flow", "unipc")],
)  # fmt: skip
def test_our_sampler_at_the_recorded_timesteps_is_the_scheduler(name, sampler):
    """In its first step. The others agree where the scheduler does nothing of its own about the ends of the chain, as
    solvers of several steps do; flows that tell the network whole numbers stand up to 5e-4 beside their t."""
    scheduler = DETERMINISTIC[name]()
    scheduler.set_timesteps(STEPS)
    table = tabulate(scheduler)
    found = find_noising(scheduler.config, table, (1.0, 0.0), 1)
    assert isinstance(found, Flow if "low" in name else Diffusion)
    process = Recorded("scheduler", (table,), noising=found)
    assert {sampler, "recorded"} <= set(samplers_of(process))
    ours = SamplingSpec(process, sampler, STEPS, table.timesteps).schedule
    first = ours.state_weights[-1, 0], ours.output_weights[-1, 0]
    np.testing.assert_allclose(first, (table.state_weights[-1][0], table.output_weights[-1][0]), rtol=2e-3, atol=2e-3)
    if sampler in ("ddim", "euler"):
        for weights in ("state_weights", "output_weights"):
            np.testing.assert_allclose(getattr(ours, weights), getattr(table, weights), atol=1e-4)


@pytest.mark.parametrize("steps", [STEPS, 60])
@pytest.mark.parametrize(
    "name",
    ["DDIM, v", "Euler", "Euler, Karras", "Heun", "EDM Euler", "flow Heun", "CogVideoX DDIM", "IPNDM", "DPM++ 2M, SDE"],
)
def test_what_no_known_process_explains_keeps_its_own_steps(name, steps):
    """With many steps, too, each of which is nearly none."""
    scheduler = {**DETERMINISTIC, **STOCHASTIC}[name]()
    scheduler.set_timesteps(steps)
    table = tabulate(scheduler)
    assert find_noising(scheduler.config, table, (1.0, 0.0), 1) is None
    process = Recorded("Some", (table,))
    assert samplers_of(process) == ("recorded",)
    with pytest.raises(UsageError, match=rf"steps is 7.*recorded with {len(table.timesteps)}"):
        _ = SamplingSpec(process, "recorded", 7).schedule


def test_another_number_of_steps_names_the_samplers_that_take_it():
    scheduler = DETERMINISTIC["flow Euler"]()
    scheduler.set_timesteps(STEPS)
    table = tabulate(scheduler)
    process = Recorded("Some", (table,), noising=find_noising(scheduler.config, table, (1.0, 0.0), 1))
    with pytest.raises(UsageError, match=r"steps is 7.*sampler such as dpm\+\+2m"):
        _ = SamplingSpec(process, "recorded", 7).schedule
    short = SamplingSpec(process, "unipc", 7)
    assert len(short.schedule) == 7
    assert len(short.choose(sampler="recorded").schedule) == STEPS


def test_a_scheduler_that_makes_nan_is_refused():
    scheduler = diffusers.UniPCMultistepScheduler(solver_type="bh1")
    scheduler.set_timesteps(STEPS)
    with pytest.raises(UsageError, match=r"UniPCMultistepScheduler.*NaN"):
        tabulate(scheduler)


@pytest.mark.parametrize("steps", [2, 3, 6])
@pytest.mark.parametrize("name", ["flow Heun", "Heun", "EDM Euler", "DEIS"])
def test_the_rounding_of_short_chains_is_no_reason_to_refuse(name, steps):
    scheduler = DETERMINISTIC[name]()
    scheduler.set_timesteps(steps)
    assert len(tabulate(scheduler).timesteps) == len(scheduler.timesteps)
