"""What layers add, what leaving one out gives, and what remedies do, on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import reference
from support import tiny_model
from tqdit.calibration.advice import read_advice
from tqdit.calibration.config import PRESETS, QuantizationConfig
from tqdit.calibration.flow import calibrate
from tqdit.calibration.layers import plan
from tqdit.calibration.without_rows import table_without_rows
from tqdit.cli.main import run
from tqdit.console import Console
from tqdit.errors import FileFormatError, UsageError
from tqdit.evaluate.layers import BitOperations, Diagnosis, changes_for, diagnose, layer_errors, leave_one_out, remedies
from tqdit.models import families
from tqdit.models.load import load_model
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.granularity import PerTimestepGroup

SMALL = {"steps": 12, "groups": 3, "rows_per_group": 8, "chains": 2, "candidates": 20}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def diagnosis(tmp_path_factory: pytest.TempPathFactory) -> Diagnosis:
    model, work = tiny_model(), tmp_path_factory.mktemp("work")
    config = replace(PRESETS["tq-dit"], weight_bits=4, activation_bits=6, **SMALL)
    return Diagnosis(model, calibrate(model, config, work).table, work, QUIET)


@pytest.mark.slow
def test_the_error_is_that_of_the_predicted_noise_weighted_by_the_step(diagnosis):
    """Under DDPM an error of the predicted noise enters the next state times beta / sqrt((1 - abar) alpha)."""
    rows, chain = diagnosis.rows, reference.timesteps(12)
    with torch.no_grad():
        a, b = (
            model.call(rows.inputs)[:, :4].double()
            for model in (diagnosis.model, apply(diagnosis.model, diagnosis.table))
        )
    every, before = reference.alphas_cumprod(chain)
    beta = 1 - every / before
    weight = (beta**2 / ((1 - every) * (1 - beta)))[rows.step.numpy()]
    error, energy = ((x**2).flatten(1).sum(1).numpy() @ weight for x in (b - a, a))
    assert diagnosis.base.mean() == pytest.approx(error / energy, rel=1e-9)


def test_every_tensor_is_left_out_once_and_the_network_is_as_it_was(diagnosis):
    before = diagnosis.errors(diagnosis.quantized)
    gains = leave_one_out(diagnosis, lambda: None)
    assert {(f.layer, f.role) for f in gains} == {(site.module, site.role) for site in diagnosis.table.sites}
    np.testing.assert_array_equal(diagnosis.errors(diagnosis.quantized), before)
    np.testing.assert_array_equal(before, diagnosis.base)
    assert all(gain.low <= gain.gain <= gain.high for gain in gains)
    assert max(gain.gain for gain in gains) > 0.05  # 4-bit weights
    assert all(gain.gain != 0 for gain in gains)  # each tensor has some effect


def test_leaving_a_tensor_out_is_the_table_without_its_site(diagnosis):
    """For a linear layer the same network can be made from a shorter table."""
    gains = {(f.layer, f.role): f.gain for f in leave_one_out(diagnosis, lambda: None)}
    for layer, role in (
        ("blocks.0.mlp.fc1", "input"),
        ("blocks.1.attn.proj", "weight"),
        ("final_layer.linear", "input"),
    ):
        kept = tuple(s for s in diagnosis.table.sites if (s.module, s.role) != (layer, role))
        errors = {name: error for name, error in diagnosis.table.errors.items() if name in {s.module for s in kept}}
        shorter = replace(diagnosis.table, sites=kept, errors=errors)
        error = diagnosis.errors(apply(diagnosis.model, shorter).network)
        assert gains[layer, role] == pytest.approx(1 - error.sum() / diagnosis.base.sum(), abs=1e-6)


def test_a_layers_error_is_that_of_its_own_quantization(diagnosis):
    """The 4-bit weights of a block lose more than the 8-bit ones of the conditioning; groups are those of the rows."""
    errors = layer_errors(diagnosis)
    assert set(errors) == set(diagnosis.table.by_module)
    assert all(len(values) == 3 and min(values) > 0 for values in errors.values())
    assert min(errors["blocks.0.attn.qkv"]) > 10 * max(errors["t_embedder.mlp.0"])


@pytest.mark.slow
def test_the_diagnosis_is_one_that_a_calibration_can_take(diagnosis, tmp_path: Path):
    found = diagnose(diagnosis, 3, QUIET)
    assert [r["gain_per_cost"] for r in found["remedies"]] == sorted(
        (r["gain_per_cost"] for r in found["remedies"]), reverse=True
    )
    bits = [r for r in found["remedies"] if "weight_bits" in r["change"]]
    assert bits
    assert max(r["gain"] for r in bits) > 0.05  # 6 bits for 4
    (tmp_path / "diagnosis.json").write_text(json.dumps(found))
    advice = read_advice(tmp_path / "diagnosis.json")
    assert advice.fingerprint == diagnosis.model.fingerprint
    table = calibrate(diagnosis.model, advice.config, tmp_path / "work").table
    for entry in found["advice"]:
        if "weight_bits" in entry["change"]:
            assert table.by_module[entry["layer"]]["weight"].quantizer.bits == 6
    mended = Diagnosis(diagnosis.model, table, tmp_path / "work", QUIET)
    assert mended.base.mean() < 0.9 * diagnosis.base.mean()


@pytest.mark.slow
def test_a_table_with_equalised_channels_is_diagnosed_in_the_folded_network(tmp_path: Path):
    model, work = tiny_model(), tmp_path / "work"
    config = replace(PRESETS["static"], weight_bits=4, activation_bits=6, **SMALL)
    table = calibrate(model, config, work).table
    assert any(site.divisor is not None for site in table.sites)
    diagnosis = Diagnosis(model, table, work, QUIET)
    direct = diagnosis.errors(apply(model, table).network)
    np.testing.assert_allclose(diagnosis.base, direct, rtol=1e-6)
    found = diagnose(diagnosis, 2, QUIET)
    assert found["settings"]["equalize"] == "range"  # for the calibration that takes the advice
    assert any(remedy["gain"] > 0 for remedy in found["remedies"])


def test_a_change_is_offered_only_where_there_is_something_to_change(diagnosis):
    def changes(layer: str) -> list:
        return changes_for(diagnosis.products[layer], diagnosis.table.by_module[layer])

    assert {"time_groups": "all"} in changes("blocks.0.attn.qkv")
    assert {"softmax": "two-region"} not in changes("blocks.0.attn.value_product")  # it has them
    assert {"gelu": "two-region"} not in changes("blocks.0.mlp.fc2")
    assert {"final": "weights"} in changes("final_layer.linear")
    assert changes("t_embedder.mlp.0") == []  # 8-bit weights alone


@pytest.mark.slow
def test_two_regions_are_offered_for_what_a_softmax_or_a_gelu_makes(tmp_path: Path):
    model = tiny_model()
    config = replace(PRESETS["ho"], softmax="uniform", gelu="uniform", **SMALL)
    diagnosis = Diagnosis(model, calibrate(model, config, tmp_path).table, tmp_path, QUIET)
    offered = {
        product.name: changes_for(product, diagnosis.table.by_module[product.name]) for product in model.products
    }
    assert {name for name, found in offered.items() if {"softmax": "two-region"} in found} == {
        "blocks.0.attn.value_product", "blocks.1.attn.value_product"
    }  # fmt: skip
    assert {name for name, found in offered.items() if {"gelu": "two-region"} in found} == {
        "blocks.0.mlp.fc2", "blocks.1.mlp.fc2"
    }  # fmt: skip
    (two_regions,) = remedies(diagnosis, [("blocks.0.attn.value_product", {"softmax": "two-region"})], lambda: None)
    assert two_regions.gain != 0
    assert two_regions.cost > 0  # a second product


@pytest.mark.slow
def test_a_network_that_is_no_dit_is_diagnosed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Two token streams, a float timestep, no guidance and flow matching: each row is an image of its own."""
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(Path(__file__).parents[1] / "toys/families")])
    model = load_model("two-streams")
    table = calibrate(model, replace(PRESETS["tq-dit"], weight_bits=4, **SMALL), tmp_path).table
    diagnosis = Diagnosis(model, table, tmp_path, QUIET)
    assert len(diagnosis.base) == len(diagnosis.rows) == 24
    found = diagnose(diagnosis, 2, QUIET)
    assert {site["layer"] for site in found["sites"]} == set(table.by_module)
    assert max(remedy["gain"] for remedy in found["remedies"] if "weight_bits" in remedy["change"]) > 0
    assert set(layer_errors(diagnosis)) == set(table.by_module)


def test_costs_are_bit_operations(diagnosis):
    costs = BitOperations(diagnosis)
    sites = diagnosis.table.by_module["blocks.0.attn.qkv"]
    products = 16 * 16 * 48  # tokens, width, three times width
    assert costs.of("blocks.0.attn.qkv", sites) == products * 4 * 6
    assert costs.of("blocks.0.mlp.fc2", diagnosis.table.by_module["blocks.0.mlp.fc2"]) == 2 * 16 * 64 * 16 * 4 * 6
    assert costs.extra("blocks.0.attn.qkv", sites) == 0
    with_groups = replace(sites["input"].quantizer, granularity=PerTimestepGroup(3), scale=np.ones(3, np.float32))
    grouped = {**sites, "input": replace(sites["input"], quantizer=with_groups)}
    per_element = 2 * 32 * 32  # x / r before the product and its inverse behind it, in float32
    assert costs.of("blocks.0.attn.qkv", grouped) == products * 4 * 6 + 16 * 16 * per_element


def test_overrides_change_the_layer_that_they_name_and_no_other():
    config = QuantizationConfig(
        overrides="blocks.0.mlp.fc1:weight-bits=4,inputs=asymmetric;final_layer.linear:final=weights"
    )
    plans = {entry.name: entry.operands for entry in plan(tiny_model(), config)}
    assert plans["blocks.0.mlp.fc1"]["weight"].bits == 4
    assert plans["blocks.0.mlp.fc1"]["input"].scheme == "asymmetric"
    assert plans["blocks.1.mlp.fc1"]["weight"].bits == 8
    assert set(plans["final_layer.linear"]) == {"weight"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blocks.0.mlp.fc1", "expected LAYER:KNOB=VALUE"),
        ("blocks.0.mlp.fc1:rounds=2", "expected LAYER:KNOB=VALUE"),
        ("blocks.0.mlp.fc1:weight_bits=x", "expected LAYER:KNOB=VALUE"),
        ("blocks.0.mlp.fc1:weight_bits=9", "--weight-bits is 9"),
        ("blocks.0.mlp.fc1:inputs=odd", "--inputs is 'odd'"),
    ],
)
def test_overrides_that_make_no_sense_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        QuantizationConfig(overrides=text)


def test_an_override_of_an_unknown_layer_is_refused():
    with pytest.raises(UsageError, match=r"names 'blocks\.9\.mlp\.fc1', which is no layer of this model"):
        plan(tiny_model(), QuantizationConfig(overrides="blocks.9.mlp.fc1:weight_bits=8"))


def test_a_file_that_is_no_diagnosis_is_refused(tmp_path, capsys):
    path = tmp_path / "diagnosis.json"
    path.write_text('{"advice": []}')
    with pytest.raises(FileFormatError, match="not a diagnosis that this tqdit reads"):
        read_advice(path)
    assert run("calibrate", ["--from-diagnosis", str(tmp_path / "none.json"), "--print"]) == 2
    assert "no such file. Write it with tqdit-evaluate --layers." in capsys.readouterr().err


def test_a_diagnosis_of_another_model_is_refused(tmp_path):
    path = tmp_path / "diagnosis.json"
    path.write_text(json.dumps({"settings": {}, "fingerprint": "a" * 64, "advice": []}))
    with pytest.raises(UsageError, match="diagnoses another model"):
        read_advice(path).check_model("b" * 64, "demo")


@pytest.mark.slow
def test_a_table_without_a_calibration_is_diagnosed(tmp_path: Path):
    model = tiny_model()
    table = table_without_rows(model, replace(PRESETS["dynamic"], weight_bits=4, activation_bits=6))
    diagnosis = Diagnosis(model, table, tmp_path, QUIET)
    layer = "blocks.0.mlp.fc2"
    product, sites = diagnosis.products[layer], table.by_module[layer]
    changes = changes_for(product, sites)
    assert changes == [{"activation_bits": 8}, {"weight_bits": 6}]  # a scale per token has no groups and no regions
    (first, second) = remedies(diagnosis, [(layer, change) for change in changes], lambda: None)
    assert {first.layer, second.layer} == {layer}
    assert first.gain > 0


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "change"), [("q-dit", "activation_bits"), ("adatsq", "group_bits")])
def test_layers_with_columns_or_bits_of_their_own_are_diagnosed(tmp_path: Path, preset: str, change: str):
    layer, model = "blocks.0.mlp.fc1", tiny_model()
    config = replace(PRESETS[preset], activation_bits=4, **SMALL)
    if preset == "q-dit":  # a part alone would not mend what the others are rounded for
        config = replace(config, column_search=3, column_sizes="8,16,32", overrides=f"{layer}:columns=0")
    diagnosis = Diagnosis(model, calibrate(model, config, tmp_path).table, tmp_path, QUIET)
    assert ("blocks.0.mlp.fc2.columns.0" in diagnosis.products) == (preset == "q-dit")
    (offered, *_) = changes_for(diagnosis.products[layer], diagnosis.table.by_module[layer])
    assert offered == {change: 6 if change == "activation_bits" else "6"}
    (found,) = remedies(diagnosis, [(layer, {change: 8 if change == "activation_bits" else "8"})], lambda: None)
    assert found.gain > 0
    assert found.cost > 0
