"""Pipelines of diffusers as int8 engines without a calibration: recorded calls tell the ports and prove the engine."""

from __future__ import annotations

import pytest
import torch

import tqdit
from support import few
from zoo.pipelines import FAMILIES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers about diffusers
]


# sana has convolutions in its blocks
@pytest.mark.parametrize("name", few(["flux", "pixart-sigma", "sana", "wan"], "sana"))
def test_a_recording_is_all_that_an_export_needs(name, tmp_path):
    pipeline, arguments = FAMILIES[name]()
    pipeline.set_progress_bar_config(disable=True)
    with tqdit.record(pipeline) as calls, torch.no_grad():
        pipeline(num_inference_steps=3, output_type="latent", **arguments)
    recording = calls.recording()
    tqdit.export(pipeline.transformer, tmp_path / "m.onnx", preset="dynamic", rows=recording)
    for backend in ("onnxruntime", "openvino"):
        engine = tmp_path / backend
        manifest = tqdit.build(tmp_path / "m.onnx", engine, backend=backend)
        assert manifest.audit.fallen_back == ()
        assert manifest.audit.integer > 5
        assert manifest.verified is not None
        assert manifest.verified.error < 0.01
