"""Forecasts of diffusers' networks: the residual of their blocks, found without knowing a class."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import tqdit
from support import few, made_once
from tqdit.engines.run.sampler import Sampler
from tqdit.errors import TqditWarning
from tqdit.models.load import load_model
from tqdit.models.recording import Recording
from tqdit.sampling import noise
from tqdit.sampling.chains import Chains, run
from tqdit.sampling.forecasts import RESIDUAL
from zoo.pipelines import FAMILIES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers about diffusers
]
STEPS = 6
TRIED = sorted(FAMILIES.keys() - {"qwen-image"})  # whose chain is no weighted sum of predictions


def recorded(name):
    pipeline, arguments = FAMILIES[name]()
    pipeline.set_progress_bar_config(disable=True)
    with tqdit.record(pipeline) as calls, torch.no_grad():
        pipeline(num_inference_steps=STEPS, output_type="latent", **arguments)
    return pipeline, calls.recording()


@pytest.mark.parametrize("name", few(TRIED, "flux", "sd3", "cogvideox", "lumina2"))
def test_a_forecast_with_the_true_residual_is_the_call_and_another_residual_is_not(name):
    """Of one stream of tokens or two, in either order, and of blocks before and after the streams meet."""
    pipeline, recording = recorded(name)
    model = load_model(pipeline.transformer, interface=recording.interface)
    inputs = model.signature.zeros(2)
    generator = np.random.default_rng(0)
    for values in (values for values in inputs.values() if values.dtype == np.float32):
        values[...] = generator.standard_normal(values.shape)
    inputs[model.signature.time.name][...] = 1
    prediction, residual = model.full(inputs)
    size = np.abs(prediction).max()
    np.testing.assert_allclose(model.forecast({**inputs, RESIDUAL: residual}), prediction, rtol=0, atol=1e-5 * size)
    assert np.abs(model.forecast({**inputs, RESIDUAL: 0 * residual}) - prediction).max() > 1e-3 * size


@pytest.fixture
def forecasting(request):
    """The name of a family and the folder with its float engine, its calls, and the shape of the pipeline's latents."""
    return request.param, made_once(f"zoo-forecasts-{request.param}", lambda folder: make(request.param, folder))


def make(name, folder):
    pipeline, recording = recorded(name)
    recording.save(folder / "calls.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqditWarning)  # of those that take one row a call
        tqdit.export(pipeline.transformer, folder / "m.onnx", rows=recording, forecast=True)
    assert tqdit.build(folder / "m.onnx", folder / "m.engine", backend="onnxruntime").forecast is not None


@pytest.mark.parametrize("forecasting", few(["flux", "sd3", "wan"], "sd3"), indirect=True)
def test_an_engine_forecasts_what_the_network_forecasts(forecasting):
    """Float engines, the same chain in PyTorch; float32 on both sides."""
    name, folder = forecasting
    recording = Recording.load(folder / "calls.safetensors")
    model = load_model(FAMILIES[name]()[0].transformer, interface=recording.interface)
    with Sampler.open(folder / "m.engine") as sampler:
        requests = {port: array[:1] for port, array in recording.requests.items()}
        found = sampler.sample_latents(requests, seed=3, full_calls=4)
        chains = Chains(sampler.card.signature, sampler.card.guidance, 1)
        spec = sampler.choose(full_calls=4)
        scale = 1.0 if sampler.card.guidance is None else sampler.card.guidance.scale
        chains.add(spec.schedule, {port: array[0] for port, array in requests.items()}, scale, 3, 0)
        expected = run(chains, model)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


# They tell the network t, t / 1000 or 1 - t / 1000. Wan, Chroma and Lumina 2 make two calls a step.
IN_PIPELINES = [name for name in TRIED if name != "flux2"]  # whose pipeline packs the latents that it is given


def in_pipeline(pipeline, arguments, state):
    """Its latents from a row of noise of the network's own shape."""
    pipeline.set_progress_bar_config(disable=True)
    arguments = {**arguments, "num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
    with torch.no_grad():
        shape = pipeline(**arguments)[0].shape  # another chain before it
        return pipeline(latents=torch.from_numpy(state).reshape(shape), **arguments)[0].numpy()


@pytest.mark.parametrize("forecasting", few(IN_PIPELINES, "sd3", "wan"), indirect=True)
def test_a_pipeline_forecasts_what_a_sampler_forecasts(forecasting):
    """The same engine and the same full calls; the loops round float32 in another order."""
    name, folder = forecasting
    requests = Recording.load(folder / "calls.safetensors").requests
    with Sampler.open(folder / "m.engine") as sampler:
        expected = sampler.sample_latents(requests, seed=3, full_calls=4)
        without = sampler.sample_latents(requests, seed=3)
    state = noise.normal(3, 0, noise.INITIAL, expected.shape[1:])
    pipeline, arguments = FAMILIES[name]()
    pipeline.transformer = tqdit.DropIn.open(folder / "m.engine")
    pipeline.transformer.forecast(pipeline.scheduler, 4)
    found = in_pipeline(pipeline, arguments, state)
    size = np.abs(expected).max()
    np.testing.assert_allclose(found.ravel(), expected.ravel(), rtol=0, atol=1e-4 * size)
    assert np.abs(without - expected).max() > 1e-3 * size
    pipeline.transformer.forecast(pipeline.scheduler, full_calls=None)
    found = in_pipeline(pipeline, arguments, state)
    np.testing.assert_allclose(found.ravel(), without.ravel(), rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("forecasting", ["flux"], indirect=True)
@pytest.mark.full
def test_a_pipeline_in_bfloat16_forecasts(forecasting, monkeypatch):
    """Flux rounds its timesteps to 8 bits, so that some of 250 steps are told the same one; the scheduler counts."""
    told = []

    def full(inputs, called=tqdit.Denoiser.full):
        told.append(float(inputs["timestep"][0]))
        return called(transformer._denoiser, inputs)

    pipeline, arguments = FAMILIES["flux"]()
    pipeline.transformer = transformer = tqdit.DropIn.open(forecasting[1] / "m.engine").to(torch.bfloat16)
    monkeypatch.setattr(transformer._denoiser, "full", full)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {
        key: value.bfloat16() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()
    }
    transformer.forecast(pipeline.scheduler, 200)
    made = pipeline(num_inference_steps=250, output_type="latent", return_dict=False, **arguments)[0]
    assert torch.isfinite(made).all()
    assert len(told) == 200 > len(set(told))


@pytest.mark.full
def test_a_network_that_is_recorded_alone_forecasts_in_its_pipeline(tmp_path):
    """Nothing is known of its chain but what the scheduler tells; two calls a step. float64 beside float32."""
    pipeline, arguments = FAMILIES["qwen-image"]()
    pipeline.set_progress_bar_config(disable=True)
    arguments = {**arguments, "num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
    with tqdit.record(pipeline.transformer) as calls, torch.no_grad():
        without = pipeline(generator=torch.manual_seed(0), **arguments)[0]
    tqdit.export(pipeline.transformer, tmp_path / "m.onnx", rows=calls, forecast=True)
    tqdit.build(tmp_path / "m.onnx", tmp_path / "m.engine", backend="onnxruntime")
    pipeline.transformer = transformer = tqdit.DropIn.open(tmp_path / "m.engine")
    transformer.forecast(pipeline.scheduler, (0, 2, 4, 5))
    found = pipeline(generator=torch.manual_seed(0), **arguments)[0]
    known, made = {0: [], 1: []}, []

    def reference(followed, inputs, precision):
        step, call = divmod(len(made), 2)
        time = float(inputs["timestep"][0])
        made.append(time)
        if STEPS - 1 - step in (0, 2, 4, 5):
            prediction, residual = transformer._denoiser.full(inputs)
            known[call].append((time, residual.astype(np.float64)))
            return prediction
        (t0, d0), (t1, d1) = known[call][-2:]
        residual = d1 + (time - t1) / (t1 - t0) * (d1 - d0)
        return transformer._denoiser.forecast({**inputs, RESIDUAL: residual.astype(np.float32)})

    transformer._next = reference
    expected = pipeline(generator=torch.manual_seed(0), **arguments)[0]
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * size)
    assert float((found - without).abs().max()) > 1e-3 * size
