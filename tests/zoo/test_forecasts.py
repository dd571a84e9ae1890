"""Forecasts of diffusers' networks: the residual of their blocks, found without knowing a class."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tqdit
from support import few
from tqdit.engines.run.sampler import Sampler
from tqdit.models.load import load_model
from tqdit.sampling.forecasts import RESIDUAL
from zoo.pipelines import FAMILIES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers about diffusers
]
TRIED = sorted(FAMILIES.keys() - {"qwen-image"})  # whose chain is no weighted sum of predictions


def recorded(name):
    pipeline, arguments = FAMILIES[name]()
    pipeline.set_progress_bar_config(disable=True)
    with tqdit.record(pipeline) as calls, torch.no_grad():
        pipeline(num_inference_steps=6, output_type="latent", **arguments)
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


@pytest.mark.parametrize("name", few(["flux", "sd3", "wan"], "sd3"))
def test_an_engine_forecasts_what_the_network_forecasts(name, tmp_path):
    """Float engines, the same chain in PyTorch; float32 on both sides."""
    from tqdit.sampling.chains import Chains, run

    pipeline, recording = recorded(name)
    tqdit.export(pipeline.transformer, tmp_path / "m.onnx", rows=recording, forecast=True)
    assert tqdit.build(tmp_path / "m.onnx", tmp_path / "m.engine", backend="onnxruntime").forecast is not None
    model = load_model(pipeline.transformer, interface=recording.interface)
    with Sampler.open(tmp_path / "m.engine") as sampler:
        requests = {port: array[:1] for port, array in recording.requests.items()}
        found = sampler.sample_latents(requests, seed=3, full_calls=4)
        chains = Chains(sampler.card.signature, sampler.card.guidance, 1)
        spec = sampler.choose(full_calls=4)
        scale = 1.0 if sampler.card.guidance is None else sampler.card.guidance.scale
        chains.add(spec.schedule, {port: array[0] for port, array in requests.items()}, scale, 3, 0)
        expected = run(chains, model)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
