"""Pipelines of diffusers, recorded, exported and sampled without PyTorch: an engine gives the pipeline's latents.

Weights are random; the classes, their layout and the pipelines' loops are diffusers' own.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tqdit.engines.build.engine import build_engine
from tqdit.engines.run.drop_in import DropIn
from tqdit.engines.run.sampler import Sampler
from tqdit.exporter.graph import ExportConfig, export_graph
from tqdit.exporter.onnx_writer import write
from tqdit.models.recorded import recorded_model
from tqdit.models.recording import Recorder
from tqdit.sampling import noise
from zoo.pipelines import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")

STEPS = 6
SEED = 7


def relative(found, expected):
    found, expected = (np.asarray(array, np.float64).ravel() for array in (found, expected))
    return np.square(found - expected).sum() / np.square(expected).sum()


def call(pipeline, arguments, **more):
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        result = pipeline(num_inference_steps=STEPS, output_type="latent", return_dict=False, **arguments, **more)
    return result[0]


@pytest.fixture(scope="module", params=FAMILIES)
def recorded(request, tmp_path_factory):
    """A pipeline with its arguments, its recording, the latents of that run, and a float bundle of its transformer."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline, arguments = FAMILIES[request.param]()
    with Recorder(pipeline) as recorder:
        latents = call(pipeline, arguments, generator=torch.Generator().manual_seed(0))
    recording = recorder.recording()
    model = recorded_model(pipeline.transformer, recording.interface)
    write(folder / "model.onnx", *export_graph(model, ExportConfig()))
    build_engine(folder / "model.onnx", folder / "model.engine", "onnxruntime")
    return pipeline, arguments, recording, latents, folder / "model.engine"


@pytest.mark.slow
def test_the_loop_without_torch_gives_the_pipelines_latents(recorded):
    pipeline, arguments, recording, _, engine = recorded
    with Sampler.open(engine) as sampler:
        found = sampler.sample_latents(recording.requests, seed=SEED)
    start = noise.normal(SEED, 0, noise.INITIAL, found.shape[1:])
    expected = call(pipeline, arguments, latents=torch.from_numpy(start)[None])
    assert relative(found, expected) < 1e-8


@pytest.mark.slow
def test_the_drop_in_gives_the_pipelines_latents(recorded):
    pipeline, arguments, _, expected, engine = recorded
    network, pipeline.transformer = pipeline.transformer, DropIn.open(engine)
    try:
        found = call(pipeline, arguments, generator=torch.Generator().manual_seed(0))
    finally:
        pipeline.transformer = network
    assert relative(found, expected) < 1e-8
