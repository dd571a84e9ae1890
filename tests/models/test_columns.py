"""Linear layers as sums of narrower ones: what is split, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tqdit
from support import assert_agrees, few, tiny_model
from tables import random_rows
from tqdit.calibration.config import PRESETS
from tqdit.calibration.flow import calibrate
from tqdit.calibration.without_rows import table_without_rows
from tqdit.errors import FileFormatError, UsageError
from tqdit.models.columns import narrow
from tqdit.models.loaded import LoadedModel
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.table import read_scale_table, write_scale_table

BLOCK = "blocks.0"  # of width 16, its feed-forward layer of 64
SINGLE = "blocks.0.attn.qkv:columns=8;blocks.0.mlp.fc2:columns=15;blocks.1.mlp.fc2:columns=13"


def widths(model: LoadedModel, layer: str) -> list[int]:
    return [product.columns for product in model.products if product.name.startswith(f"{layer}.columns.")]


@pytest.mark.parametrize(
    ("most", "expected"),
    [(16, [16, 16, 16, 16]), (32, [32, 32]), (20, [16, 16, 16, 16]), (30, [22, 22, 20]), (64, []), (0, [])],
)
def test_parts_are_equally_wide_but_for_the_last(most: int, expected: list[int]) -> None:
    model = narrow(tiny_model(), most)
    assert widths(model, f"{BLOCK}.mlp.fc2") == expected
    assert sum(expected) in (0, 64)


def test_blocks_alone_are_split_and_the_prediction_stays() -> None:
    model = tiny_model()
    narrowed = narrow(model, 5)
    names = {product.name.partition(".columns.")[0] for product in narrowed.products if ".columns." in product.name}
    assert names == {
        f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    inputs = random_rows(model.signature, 4)
    np.testing.assert_allclose(narrowed(inputs), model(inputs), rtol=1e-4, atol=1e-5)
    assert narrowed.fingerprint == model.fingerprint
    weight = model.network.get_submodule(f"{BLOCK}.mlp.fc1").weight
    part = narrowed.network.get_submodule(f"{BLOCK}.mlp.fc1.columns.1").weight
    assert part.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()  # no second copy of the weights


def test_layers_have_parts_of_their_own() -> None:
    columns = {f"{BLOCK}.mlp.fc2": 24, f"{BLOCK}.attn.qkv": 0}
    model = narrow(tiny_model(), 8, columns)
    assert widths(model, f"{BLOCK}.mlp.fc2") == [22, 22, 20]
    assert widths(model, f"{BLOCK}.attn.qkv") == []
    assert widths(model, f"{BLOCK}.attn.proj") == [8, 8]
    assert narrow(model, 8, columns) is model


def test_overrides_of_a_layer_hold_for_its_parts_and_a_part_has_its_own() -> None:
    bits = f"{BLOCK}.mlp.fc2:columns=32,activation_bits=6;{BLOCK}.mlp.fc2.columns.1:activation_bits=4"
    table = table_without_rows(tiny_model(), replace(PRESETS["dynamic"], overrides=bits))
    found = [table.by_module[f"{BLOCK}.mlp.fc2.columns.{part}"]["input"].quantizer.bits for part in (0, 1)]
    assert found == [6, 4]
    assert table.by_module[f"{BLOCK}.mlp.fc1"]["input"].quantizer.bits == 8


@pytest.mark.slow
def test_columns_of_single_layers_travel_in_the_file(tmp_path: Path) -> None:
    model = tiny_model()
    table = table_without_rows(model, replace(PRESETS["dynamic"], overrides=SINGLE))
    write_scale_table(tmp_path / "scales.safetensors", table)
    read = read_scale_table(tmp_path / "scales.safetensors")
    assert read.layer_columns == {f"{BLOCK}.attn.qkv": 8, f"{BLOCK}.mlp.fc2": 15, "blocks.1.mlp.fc2": 13}
    inputs = random_rows(model.signature, 2)
    np.testing.assert_array_equal(apply(model, read)(inputs), apply(model, table)(inputs))


def test_splitting_what_is_split_changes_nothing() -> None:
    model = narrow(tiny_model(), 16)
    assert narrow(model, 16) is model


@pytest.mark.slow
def test_each_part_has_scales_of_its_own_in_a_file(tmp_path: Path) -> None:
    model = tiny_model()
    config = replace(PRESETS["dynamic"], columns=16, weight_bits=4)
    table = table_without_rows(model, config)
    write_scale_table(tmp_path / "scales.safetensors", table)
    assert read_scale_table(tmp_path / "scales.safetensors") == table
    weight = model.network.get_submodule(f"{BLOCK}.mlp.fc2").weight
    for number in range(4):
        sites = table.by_module[f"{BLOCK}.mlp.fc2.columns.{number}"]
        largest = weight[:, 16 * number : 16 * (number + 1)].abs().amax(1).numpy()
        share = sites["weight"].quantizer.arrays()["scale"] * 7.5 / largest
        assert (share > 0.39).all()
        assert (share < 1.01).all()


@pytest.mark.slow
def test_narrower_groups_are_less_error() -> None:
    errors = []
    for columns in (0, 4):
        golden = table_without_rows(tiny_model(), replace(PRESETS["dynamic"], columns=columns, weight_bits=4)).golden
        assert golden is not None
        errors.append(golden.errors.mean())
    assert errors[0] > errors[1]


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(["onnxruntime", "openvino"], "openvino"))
@pytest.mark.parametrize(
    ("knobs", "products"),
    [
        pytest.param({"columns": 16}, 2 * (3 + 4) + 1, marks=pytest.mark.full),  # fc2 has four parts, others one
        ({"inputs": "dynamic_asymmetric", "overrides": SINGLE}, (2 + 7) + (3 + 5) + 1),
    ],
    ids=["all", "each its own"],
)
def test_an_engine_multiplies_each_part_as_integers(
    tmp_path: Path, backend: str, knobs: dict[str, Any], products: int
) -> None:
    model = tiny_model()
    table = table_without_rows(model, replace(PRESETS["dynamic"], **knobs))
    tqdit.export(model, tmp_path / "model.onnx", scales=table)
    manifest = tqdit.build(tmp_path / "model.onnx", tmp_path / "model.engine", backend=backend)
    assert manifest.audit is not None
    assert manifest.audit.fallen_back == ()
    assert manifest.audit.integer == products
    inputs = random_rows(model.signature, 24)
    with tqdit.Denoiser.open(tmp_path / "model.engine") as denoise:
        assert_agrees(denoise(**inputs), apply(model, table)(inputs))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["search", "gptq"])
def test_a_search_goes_part_by_part(tmp_path: Path, method: str) -> None:
    small = {"steps": 12, "groups": 3, "rows_per_group": 4, "chains": 2, "candidates": 20}
    config = replace(PRESETS["fast"], columns=32, method=method, **small)
    table = calibrate(tiny_model(), config, tmp_path).table
    assert {f"{BLOCK}.mlp.fc2.columns.0", f"{BLOCK}.mlp.fc2.columns.1", f"{BLOCK}.mlp.fc1"} <= set(table.by_module)
    assert set(table.errors) == set(table.by_module)
    assert table.golden is not None
    assert table.golden.errors.mean() < 0.2


@pytest.mark.slow
def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model()
    table = table_without_rows(model, replace(PRESETS["dynamic"], columns=16))
    without = replace(table, settings={**table.settings, "columns": 0})
    with pytest.raises(UsageError, match=r"names 'blocks.0.mlp.fc2.columns.0', which the network lacks"):
        apply(model, without)
    for wrong in (-1, "16", 2.5, True, None):
        with pytest.raises(FileFormatError, match="setting 'columns'"):
            apply(model, replace(table, settings={**table.settings, "columns": wrong}))
    for each in ({BLOCK: 16}, {f"{BLOCK}.attn.scores": 16}, {"no.such": 16}):
        with pytest.raises(UsageError, match="cannot be in groups of columns"):
            apply(model, replace(table, settings={**table.settings, "layer_columns": each}))
    for held in (4, [4], {f"{BLOCK}.mlp.fc2": "4"}):
        with pytest.raises(FileFormatError, match="setting 'layer_columns"):
            apply(model, replace(table, settings={**table.settings, "layer_columns": held}))
    for number in (-1, 1 << 16):
        with pytest.raises(UsageError, match="--columns"):
            replace(PRESETS["dynamic"], columns=number)
