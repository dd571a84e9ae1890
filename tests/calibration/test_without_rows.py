"""Scale tables without a calibration: from weights alone, with golden calls of noise or of recorded calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tqdit
from support import tiny_model
from tqdit.calibration import flow, without_rows
from tqdit.calibration.config import PRESETS, presets_without_rows
from tqdit.calibration.flow import calibrate
from tqdit.calibration.layers import OperandPlan
from tqdit.calibration.methods import weights
from tqdit.calibration.operands import Weight
from tqdit.calibration.without_rows import preset_without_rows, table_without_rows
from tqdit.cli.main import main
from tqdit.engines.bundle import read_manifest
from tqdit.errors import TqditWarning, UsageError
from tqdit.golden import relative_errors
from tqdit.models.loaded import LoadedModel
from tqdit.onnx_file import read_card
from tqdit.quantization.fake_quant import apply, weight_codes
from tqdit.quantization.granularity import PerToken
from tqdit.quantization.table import read_scale_table

pytestmark = pytest.mark.slow

DYNAMIC = PRESETS["dynamic"]


def test_what_is_quantized() -> None:
    table = table_without_rows(tiny_model(), DYNAMIC)
    inputs = {site.module: site.quantizer for site in table.sites if site.role == "input"}
    assert {name.rpartition(".")[2] for name in inputs} == {"qkv", "proj", "fc1", "fc2", "linear"}
    assert {(q.scheme, q.granularity) for q in inputs.values()} == {("dynamic", PerToken())}
    assert {site.role for site in table.sites} == {"weight", "input"}  # attention stays float
    assert "blocks.0.adaLN_modulation.1" in table.by_module
    assert (table.groups, dict(table.errors)) == (1, {})


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_no_candidate_leaves_a_smaller_error_of_the_weight(bits: int) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_t(4, (6, 200)).astype(np.float32))
    factors = torch.linspace(0.4, 1, 25)
    operand = Weight(weight, OperandPlan("symmetric", bits, 6), factors)
    found = weights.nearest(operand)["scale"]

    def error(scale: torch.Tensor) -> torch.Tensor:
        q = 2 ** (bits - 1)
        codes = torch.clamp(torch.round(weight / scale[:, None]), -q, q - 1)
        return (codes * scale[:, None] - weight).square().sum(1)

    every = torch.stack([error(factor * operand.initial["scale"]) for factor in factors])
    torch.testing.assert_close(error(found), every.amin(0), rtol=1e-5, atol=0)
    if bits < 8:  # clipping the largest weights pays
        assert (error(found) < 0.95 * error(operand.initial["scale"])).all()


def test_fewer_bits_of_weights_are_more_error() -> None:
    model = tiny_model()
    errors = []
    for bits in (8, 6, 4):
        golden = table_without_rows(model, replace(DYNAMIC, weight_bits=bits, activation_bits=bits)).golden
        assert golden is not None
        errors.append(golden.errors.mean())
    assert errors[0] < errors[1] < errors[2]


def test_golden_calls_of_noise_span_the_chain_and_tell_the_error() -> None:
    model = tiny_model()
    table = table_without_rows(model, DYNAMIC)
    golden = table.golden
    assert golden is not None
    assert len(golden) == without_rows.ROWS
    timesteps = golden.inputs["timestep"]
    assert timesteps.min() < 500 <= timesteps.max()
    assert 0.8 < golden.inputs["x"].std() < 1.2
    assert golden.inputs["class_labels"].tolist()[1::2] == [5, 5]  # the unconditional rows
    np.testing.assert_allclose(golden.prediction, model(golden.inputs), rtol=1e-4, atol=1e-5)
    found = relative_errors(apply(model, table)(golden.inputs), golden.prediction)
    np.testing.assert_allclose(golden.errors, found, rtol=0.05)  # codes may flip in a batch
    assert table_without_rows(model, DYNAMIC) == table  # the same every time


def test_a_network_whose_calls_take_too_long_has_no_golden_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(without_rows, "MOST_MULTIPLY_ADDS", 100)
    with pytest.warns(TqditWarning, match=r"no golden calls.* multiply-adds\. tqdit-calibrate"):
        assert table_without_rows(model, DYNAMIC).golden is None


def test_a_calibration_finds_the_same_scales_and_golden_calls_of_a_chain(tmp_path: Path) -> None:
    model, config = tiny_model(), replace(DYNAMIC, steps=12)
    found = calibrate(model, config, tmp_path)
    assert set(found.meter.spent) == {"rows", "golden calls"}  # no gradients and no search
    without = table_without_rows(model, config)
    assert [site.name for site in found.table.sites] == [site.name for site in without.sites]
    for one, other in zip(found.table.sites, without.sites, strict=True):
        assert all(np.array_equal(array, other.arrays()[name]) for name, array in one.arrays().items())
    assert found.table.golden is not None
    assert without.golden is not None
    assert not np.array_equal(found.table.golden.inputs["x"][:1], without.golden.inputs["x"][:1])


def test_no_chain_runs_and_no_layer_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Trajectory", "Capture"):
        monkeypatch.setattr(flow, name, None)
    assert table_without_rows(tiny_model(), DYNAMIC).golden is not None


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"inputs": "symmetric"}, "qkv.input' has scheme 'symmetric'.*--inputs dynamic"),
        ({"gelu": "two-region"}, "fc2.input' has scheme 'gelu'.*--gelu uniform"),
        ({"attention": True}, "scores.left' has scheme 'symmetric'.*--no-attention"),
    ],
)
def test_what_needs_rows_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knobs: dict[str, object], words: str
) -> None:
    monkeypatch.setattr(weights, "nearest", None)
    monkeypatch.setattr(flow, "Trajectory", None)
    config = replace(DYNAMIC, **knobs)
    with pytest.raises(UsageError, match=words):
        table_without_rows(tiny_model(), config)
    with pytest.raises(UsageError, match=words):
        calibrate(tiny_model(), config, tmp_path)


def test_channels_of_weights_without_a_search_are_equalised_on_rows_alone(tmp_path: Path) -> None:
    model, config = tiny_model(), replace(DYNAMIC, equalize=True, steps=12)
    with pytest.raises(UsageError, match="--equalize needs calibration rows"):
        table_without_rows(model, config)
    found = calibrate(model, config, tmp_path)
    assert {site.module for site in found.table.sites if site.divisor is not None} & {"blocks.0.mlp.fc1"}
    assert set(found.meter.spent) == {"rows", "inputs", "gradients", "search", "golden calls"}


def test_bits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="--activation-bits is 9"):
        replace(DYNAMIC, activation_bits=9)


def test_presets_that_need_a_calibration_are_no_presets_of_an_export(tmp_path: Path) -> None:
    assert presets_without_rows() == ["dynamic"]
    assert preset_without_rows("dynamic") == DYNAMIC
    for name, words in (("fast", "'fast' needs a calibration"), ("quick", "'quick' is unknown")):
        with pytest.raises(UsageError, match=words):
            tqdit.export(tiny_model(), tmp_path / "m.onnx", preset=name)
    with pytest.raises(UsageError, match="preset 'dynamic' and scales"):
        tqdit.export(tiny_model(), tmp_path / "m.onnx", preset="dynamic", scales="scales.safetensors")
    assert not list(tmp_path.iterdir())


def test_dynamic_inputs_in_a_search(tmp_path: Path) -> None:
    """The scheme goes with every method and with the quantized products of attention."""
    small = {"steps": 12, "groups": 3, "rows_per_group": 4, "chains": 2, "candidates": 20}
    config = replace(PRESETS["static"], inputs="dynamic", gelu="uniform", **small)
    table = calibrate(tiny_model(), config, tmp_path).table
    schemes = {(site.role, site.quantizer.scheme) for site in table.sites}
    assert ("input", "dynamic") in schemes
    assert ("left", "softmax") in schemes
    assert any(site.divisor is not None for site in table.sites)
    assert set(table.errors) == set(table.by_module)
    assert all(site.quantizer.granularity == PerToken() for site in table.sites if site.role == "input")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_export_in_python_builds_and_is_verified(tmp_path: Path, backend: str) -> None:
    model: LoadedModel = tiny_model(pixels=True)
    tqdit.export(model, tmp_path / "model.onnx", preset="dynamic")
    card = read_card(tmp_path / "model.onnx").quantization
    assert card is not None
    assert (card.weight_bits, card.activation_bits, card.attention) == (8, 8, "float")
    manifest = tqdit.build(tmp_path / "model.onnx", tmp_path / "model.engine", backend=backend)
    assert manifest.audit is not None
    assert manifest.audit.fallen_back == ()
    assert manifest.verified is not None
    with tqdit.Sampler.open(tmp_path / "model.engine") as sampler:
        assert sampler.sample([1, 2], seed=3, steps=4).shape == (2, 8, 8, 3)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_file: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "m.onnx", "--model", str(own_file), "--preset", "dynamic", "-q"]) == 0
    assert main(["build", "m.onnx", "-q", "--backend", "onnxruntime"]) == 0
    verified = read_manifest(tmp_path / "m.engine").verified
    assert verified is not None
    assert main(["calibrate", str(own_file), "--preset", "dynamic", "--steps", "12", "-q"]) == 0
    table = read_scale_table(tmp_path / "scales.safetensors")
    weight = tiny_model().network.get_submodule("blocks.0.attn.qkv").weight
    codes, _ = weight_codes(weight, table.by_module["blocks.0.attn.qkv"]["weight"])
    assert codes.abs().max() <= 128
    for wrong in (["dynamic", "--float"], ["fast"]):
        with pytest.raises(SystemExit, match="2"):
            main(["export", "m.onnx", "--preset", *wrong])
