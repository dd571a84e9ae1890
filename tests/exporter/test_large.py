"""Weights that stay in their file: the same export as from memory, without a copy of the weights in memory."""

from __future__ import annotations

import pytest
import torch

import tqdit
from support import made_once
from tqdit.models import weights
from tqdit.models.load import load_model
from tqdit.quantization.table import read_scale_table
from zoo.pipelines import FAMILIES

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers about diffusers
]
KNOBS = {"groups": 2, "rows_per_group": 2, "candidates": 4, "rounds": 1, "token_share": 0.5}


@pytest.fixture
def flux():
    """A folder with a Flux transformer in bfloat16, in shards, and scales.safetensors that were found for it."""
    return made_once("large-flux", make)


def make(folder):
    pipeline, arguments = FAMILIES["flux"]()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.to(torch.bfloat16).to(torch.float32).save_pretrained(folder / "float")
    with torch.no_grad(), tqdit.record(pipeline) as calls:
        pipeline(num_inference_steps=2, output_type="latent", **arguments)
    calls.recording().save(folder / "calls.safetensors")
    tqdit.calibrate(pipeline.transformer, rows=calls, output=folder / "scales.safetensors", **KNOBS)
    pipeline.transformer.to(torch.bfloat16).save_pretrained(folder / "transformer", max_shard_size="50KB")


@pytest.fixture
def streamed(monkeypatch):
    monkeypatch.setattr(weights, "LARGE", 64)


def test_the_file_is_that_of_an_export_from_memory(flux, streamed, tmp_path):
    scales = flux / "scales.safetensors"
    interface = read_scale_table(scales).interface
    model = load_model(flux / "transformer", interface=interface, in_memory=False)
    assert len(model.weights.files) > 20
    assert model.fingerprint == load_model(flux / "float", interface=interface).fingerprint
    for name, table in (("int8", scales), ("float", None)):
        tqdit.export(model, tmp_path / f"{name}-streamed.onnx", scales=table)
        tqdit.export(load_model(flux / "transformer", interface=interface), tmp_path / f"{name}.onnx", scales=table)
        assert (tmp_path / f"{name}.onnx").read_bytes() == (tmp_path / f"{name}-streamed.onnx").read_bytes()
