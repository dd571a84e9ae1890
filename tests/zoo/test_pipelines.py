"""Pipelines of diffusers, recorded, exported and sampled without PyTorch: the float engine gives the pipeline's latents.

Weights are random; the classes, their layout and the pipelines' loops are diffusers' own.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from zoo.pipelines import FAMILIES

from tqdit.engines.build.engine import build_engine
from tqdit.engines.run.sampler import Sampler
from tqdit.exporter.graph import ExportConfig, export_graph
from tqdit.exporter.onnx_writer import write
from tqdit.models.recorded import recorded_model
from tqdit.models.recording import Recorder
from tqdit.sampling import noise

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


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_without_torch_gives_the_pipelines_latents(family, tmp_path):
    pipeline, arguments = FAMILIES[family]()
    with Recorder(pipeline) as recorder:
        call(pipeline, arguments, generator=torch.Generator().manual_seed(0))
    recording = recorder.recording()
    model = recorded_model(pipeline.transformer, recording.interface)
    write(tmp_path / "model.onnx", *export_graph(model, ExportConfig()))
    build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", "onnxruntime")
    with Sampler.open(tmp_path / "model.engine") as sampler:
        found = sampler.sample_latents(recording.requests, seed=SEED)
    start = noise.normal(SEED, 0, noise.INITIAL, found.shape[1:])
    expected = call(pipeline, arguments, latents=torch.from_numpy(start)[None])
    assert relative(found, expected) < 1e-8
