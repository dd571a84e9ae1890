"""A scheme in one file goes through the whole flow: search, scale table, fake-quantized network and ONNX file."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime as ort
import pytest
import torch

import support
from tqdit.calibration.config import PRESETS, QuantizationConfig, choices_of
from tqdit.calibration.flow import calibrate
from tqdit.errors import FileFormatError, UsageError
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write
from tqdit.quantization import schemes
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.granularity import PerTensor
from tqdit.quantization.table import Site, read_scale_table, write_scale_table

SMALL = {"steps": 12, "groups": 3, "rows_per_group": 4, "chains": 2, "candidates": 20}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[1] / "toys" / "schemes"
    monkeypatch.setattr(schemes, "__path__", [*schemes.__path__, str(folder)])


def inputs_choices() -> tuple[str, ...]:
    return next(choices_of(knob) for knob in fields(QuantizationConfig) if knob.name == "inputs")


def test_without_the_file_nobody_knows_the_scheme() -> None:
    assert inputs_choices() == (
        "asymmetric", "asymmetric_bits", "dynamic", "dynamic_asymmetric", "symmetric", "symmetric_bits", "gelu"
    )  # fmt: skip
    with pytest.raises(UsageError, match="--inputs is 'power-of-two'; known are"):
        QuantizationConfig(inputs="power-of-two")


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("time_groups", ["none", "all"])
def test_one_file_takes_a_scheme_through_the_whole_flow(tmp_path: Path, time_groups: str) -> None:
    assert "power-of-two" in inputs_choices()
    model = support.tiny_model()
    config = replace(PRESETS["tq-dit"], inputs="power-of-two", time_groups=time_groups, **SMALL)
    found = calibrate(model, config, tmp_path / "work").table
    write_scale_table(tmp_path / "scales.safetensors", found)
    table = read_scale_table(tmp_path / "scales.safetensors")
    assert table == found

    sites = [site for site in table.sites if site.quantizer.scheme == "power-of-two"]
    assert {site.module.split(".")[-1] for site in sites} == {"qkv", "proj", "fc1", "linear"}
    for site in sites:
        scale = site.quantizer.arrays()["scale"]
        assert scale.shape == ((3,) if time_groups == "all" else ())
        assert (np.exp2(np.round(np.log2(scale))) == scale).all()

    path = tmp_path / "model.onnx"
    write(path, *support.exported(ExportConfig(graph="denoiser"), table=table))
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    for site in sites:
        assert stored[f"{site.name}.scale"] == site.quantizer.arrays()["scale"].max()
        assert stored[f"{site.name}.zero_point"].dtype == np.int8
        assert stored[f"{site.name}.zero_point"] == 0
    rng = np.random.default_rng(0)
    inputs = {
        "x": rng.standard_normal((48, 4, 8, 8), np.float32),
        "timestep": np.linspace(0, 999, 48).astype(np.int64),
        "class_labels": rng.integers(0, 6, 48),
    }
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (out,) = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, inputs)
    with torch.no_grad():
        expected = apply(model, table)(inputs)
        plain = model(inputs)
    support.assert_agrees(out, expected)
    assert np.linalg.norm(expected - plain) > 1e-3 * np.linalg.norm(plain)


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_the_scheme_checks_its_own_values(tmp_path: Path) -> None:
    scheme = schemes.find_schemes()["power-of-two"]
    table = calibrate(support.tiny_model(), replace(PRESETS["min-max"], **SMALL), tmp_path).table
    site = Site("blocks.0.attn.qkv", "input", scheme(8, PerTensor(), np.array(0.3, np.float32)))
    with pytest.raises(FileFormatError, match=r"attn.qkv.input.scale' .* no powers of two"):
        replace(table, sites=(site,))
