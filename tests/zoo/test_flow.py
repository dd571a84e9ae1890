"""The whole flow in Python for pipelines of diffusers: record, calibrate, export, build, sample, and the drop-in.

int8: nothing falls back on either CPU backend. An engine computes the fake-quantized network: 1e-9 (relative square) or
what 1e-6 of noise on the inputs changes, if that flips a code.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tqdit
from tqdit.models.load import load_model
from tqdit.models.recording import Recording
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.table import read_scale_table
from zoo.pipelines import FAMILIES
from zoo.test_pipelines import call, relative

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")]
KNOBS = {"groups": 3, "rows_per_group": 4, "candidates": 20, "rounds": 1, "token_share": 0.5}


@pytest.fixture(scope="module", params=FAMILIES)
def flow(request, tmp_path_factory):
    """The folder with calls.safetensors, scales.safetensors, model.onnx; the pipeline, its arguments and latents."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline, arguments = FAMILIES[request.param]()
    with tqdit.record(pipeline) as calls:
        latents = call(pipeline, arguments, generator=torch.Generator().manual_seed(0))
    calls.recording().save(folder / "calls.safetensors")
    scales = folder / "scales.safetensors"
    tqdit.calibrate(pipeline.transformer, rows=calls, output=scales, **KNOBS)
    tqdit.export(pipeline.transformer, folder / "model.onnx", scales=scales)
    return folder, pipeline, arguments, latents


def test_recorded_calls_are_read_as_they_were_written(flow):
    folder, pipeline, *_ = flow
    recording = Recording.load(folder / "calls.safetensors")
    again = recording.save(folder / "again.safetensors")
    assert again.read_bytes() == (folder / "calls.safetensors").read_bytes()
    table = tqdit.calibrate(pipeline.transformer, rows=again, **KNOBS)
    assert table.to_bytes() == (folder / "scales.safetensors").read_bytes()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_engine_is_integer_and_computes_the_fake_quantized_network(flow, backend):
    folder, pipeline, *_ = flow
    manifest = tqdit.build(folder / "model.onnx", folder / f"{backend}.engine", backend=backend)
    assert manifest.audit is not None
    assert not manifest.audit.fallen_back
    assert manifest.audit.integer > 10
    assert manifest.verified is not None
    table = read_scale_table(folder / "scales.safetensors")
    quantized = apply(load_model(pipeline.transformer, interface=table.interface), table)
    expected = quantized(table.golden.inputs)
    rng = np.random.default_rng(0)
    moved = {
        name: array * (1 + 1e-6 * rng.standard_normal(array.shape)).astype(np.float32)
        if array.dtype == np.float32 else array
        for name, array in table.golden.inputs.items()
    }  # fmt: skip
    sensitivity = relative(quantized(moved), expected)
    with tqdit.Denoiser.open(folder / f"{backend}.engine") as denoise:
        assert relative(denoise(**table.golden.inputs), expected) < max(1e-9, 4 * sensitivity)


def test_the_int8_drop_in_stays_near_the_pipeline(flow):
    folder, pipeline, arguments, expected = flow
    if not (folder / "onnxruntime.engine").exists():
        tqdit.build(folder / "model.onnx", folder / "onnxruntime.engine", backend="onnxruntime")
    network, pipeline.transformer = pipeline.transformer, tqdit.DropIn.open(folder / "onnxruntime.engine")
    try:
        found = call(pipeline, arguments, generator=torch.Generator().manual_seed(0))
    finally:
        pipeline.transformer = network
    assert relative(found, expected) < 1e-2  # random weights; measured 1e-4 to 3e-3
