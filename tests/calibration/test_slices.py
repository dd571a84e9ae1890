"""Weights that stay in their file: the same scale table as from memory."""

from __future__ import annotations

import pytest
import torch

import tqdit
from support import few, made_once
from tqdit.calibration import capture
from tqdit.models import weights
from tqdit.models.load import load_model
from tqdit.models.recording import Recording
from tqdit.quantization.table import read_scale_table
from zoo.pipelines import FAMILIES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers about diffusers
]
KNOBS = {"preset": "tq-dit", "groups": 2, "rows_per_group": 2, "candidates": 4, "rounds": 1, "token_share": 0.5}


@pytest.fixture(autouse=True)
def streamed(monkeypatch):
    monkeypatch.setattr(weights, "LARGE", 64)


FOLDERS = ["flux", "sd3"]  # sd3 has a large buffer


@pytest.fixture(params=FOLDERS)
def folder(request):
    return made_once(f"slices-{request.param}", lambda folder: make(folder, request.param))


def make(folder, family):
    pipeline, arguments = FAMILIES[family]()
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad(), tqdit.record(pipeline) as calls:
        pipeline(num_inference_steps=2, output_type="latent", **arguments)
    calls.recording().save(folder / "calls.safetensors")
    pipeline.transformer.to(torch.bfloat16).save_pretrained(folder / "transformer", max_shard_size="50KB")


def loaded(folder, in_memory):
    interface = Recording.load(folder / "calls.safetensors").interface
    model = load_model(folder / "transformer", interface=interface, in_memory=in_memory)
    assert bool(model.weights.made) != in_memory
    return model


def calibrated(folder, in_memory, **knobs):
    return tqdit.calibrate(loaded(folder, in_memory), rows=folder / "calls.safetensors", **KNOBS | knobs)


@pytest.mark.parametrize(("folder", "method"), few(
    [(family, method) for family in FOLDERS for method in ("search", "gptq", "reconstruct")],
    ("flux", "reconstruct"), ("sd3", "search"),
), indirect=["folder"])  # fmt: skip
def test_the_table_is_that_of_a_calibration_from_memory(folder, method, monkeypatch):
    if method != "search":
        monkeypatch.setattr(capture, "GRAPH_BYTES", 1)  # blocks are computed again
    tables = [calibrated(folder, in_memory, method=method, iterations=2) for in_memory in (True, False)]
    assert tables[0].to_bytes() == tables[1].to_bytes()
    assert tables[0].golden.errors.max() > 0


@pytest.mark.parametrize("folder", ["flux"], indirect=True)
def test_an_equalised_table_is_that_of_a_calibration_from_memory(folder):
    tables = [calibrated(folder, in_memory, equalize=True, preset="fast") for in_memory in (True, False)]
    assert any(site.divisor is not None for site in tables[0].sites)
    assert tables[0].to_bytes() == tables[1].to_bytes()


@pytest.mark.parametrize("folder", few(FOLDERS, "sd3"), indirect=True)
def test_a_directory_is_calibrated_without_loading_it_whole(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", None)
    output = tmp_path / "scales.safetensors"
    tqdit.calibrate(folder / "transformer", rows=folder / "calls.safetensors", output=output, **KNOBS)
    assert read_scale_table(output).golden is not None
