"""Bits of their own in each group of timesteps: the grid, the search, the file and the engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tqdit
from support import assert_agrees, tiny_model
from tables import Kind, make_table, random_rows
from tqdit.calibration.config import PRESETS
from tqdit.calibration.flow import calibrate
from tqdit.errors import FileFormatError, UsageError
from tqdit.quantization.fake_quant import QuantizedOperand, RowGroups, apply
from tqdit.quantization.granularity import PerTimestepGroup
from tqdit.quantization.schemes.asymmetric_bits import AsymmetricBits
from tqdit.quantization.schemes.symmetric_bits import SymmetricBits
from tqdit.quantization.table import read_scale_table, write_scale_table

SMALL = {"steps": 12, "groups": 3, "rows_per_group": 4, "chains": 2, "candidates": 20}
SCHEMES = {"symmetric_bits": SymmetricBits, "asymmetric_bits": AsymmetricBits}
CONFIG = replace(PRESETS["static"], equalize=False, gelu="uniform", group_bits="8/5/3", **SMALL)
LAYER = "blocks.0.mlp.fc1"


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 8), st.floats(1e-3, 10), st.floats(0, 1)), min_size=3, max_size=3),
    st.integers(0, 1 << 30),
)
def test_a_row_takes_the_bits_of_its_group(scheme: str, entries: list[tuple[int, float, float]], seed: int) -> None:
    """The fake-quantized operand against NumPy, in the order of operations of its form up to the last bit."""
    bits, scale = np.array([b for b, _, _ in entries], np.int32), np.array([s for _, s, _ in entries], np.float32)
    zero = np.array([round(share * (2**b - 1)) for b, _, share in entries], np.int32)
    x = (np.random.default_rng(seed).normal(size=(6, 4, 8)) * 20 * scale.max()).astype(np.float32)
    group = np.array([0, 0, 1, 1, 2, 2])
    s, b, o = (array[group].reshape(6, 1, 1) for array in (scale, bits, zero))
    if scheme == "symmetric_bits":
        quantizer: Any = SymmetricBits(6, PerTimestepGroup(3), scale, bits)
        expected = np.clip(np.round(x.astype(float) / s), -(2.0 ** (b - 1)), 2.0 ** (b - 1) - 1) * s
    else:
        quantizer = AsymmetricBits(6, PerTimestepGroup(3), scale, zero, bits)
        expected = (np.clip(np.round(x.astype(float) / s) + o, 0, 2.0**b - 1) - o) * s
    rows = RowGroups()
    operand = QuantizedOperand(quantizer, rows)
    with rows.set(torch.from_numpy(group)):
        (part,) = operand.parts(torch.from_numpy(x))
    found = (part.values if part.ratio is None else part.values * part.ratio) + (
        0 if part.offset is None else part.offset
    )
    steps = (found.numpy() - expected) / s
    assert np.abs(np.round(steps) - steps).max() < 0.02  # on the same grid,
    assert (np.abs(steps) > 0.5).mean() < 0.02  # and off only where rounding is a tie
    for each in range(3):
        assert len(np.unique(np.round((found.numpy() / s)[group == each] * 8) / 8)) <= 2 ** int(bits[each])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_search_finds_scales_for_the_bits_of_each_group(tmp_path: Path, scheme: str) -> None:
    model = tiny_model()
    config = replace(CONFIG, inputs=scheme, overrides=f"{LAYER}:group_bits=4/4/8")
    table = calibrate(model, config, tmp_path / "work").table
    write_scale_table(tmp_path / "scales.safetensors", table)
    assert read_scale_table(tmp_path / "scales.safetensors") == table
    found = {
        name: table.by_module[name]["input"].quantizer for name in (LAYER, "blocks.0.mlp.fc2", "final_layer.linear")
    }
    assert [quantizer.arrays()["group_bits"].tolist() for quantizer in found.values()] == [
        [4, 4, 8],
        [8, 5, 3],
        [8, 8, 8],
    ]
    assert {type(quantizer) for quantizer in found.values()} == {SCHEMES[scheme]}
    scale = found["blocks.0.mlp.fc2"].arrays()["scale"]
    assert scale[2] > 4 * scale[0]  # of 3 and of 8 bits


@pytest.mark.slow
def test_the_same_bits_everywhere_give_the_scheme_without(tmp_path: Path) -> None:
    model, tables = tiny_model(), []
    inputs = random_rows(model.signature, 12)
    for scheme, bits in (("asymmetric", ""), ("asymmetric_bits", "6")):
        config = replace(CONFIG, inputs=scheme, group_bits=bits, activation_bits=6)
        tables.append(calibrate(model, config, tmp_path / scheme).table)
    plain, found = (table.by_module[LAYER]["input"].quantizer.arrays() for table in tables)
    np.testing.assert_array_equal(plain["scale"], found["scale"])
    np.testing.assert_array_equal(plain["zero_point"], found["zero_point"])
    assert_agrees(apply(model, tables[1])(inputs), apply(model, tables[0])(inputs), 6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_engines_multiply_integers(tmp_path: Path, backend: str, asymmetric: bool) -> None:
    model = tiny_model()
    table = make_table(model, Kind(groups=5, everywhere=True, group_bits=True, asymmetric=asymmetric))
    tqdit.export(model, tmp_path / "model.onnx", scales=table)
    audit = tqdit.build(tmp_path / "model.onnx", tmp_path / "model.engine", backend=backend).audit
    assert audit is not None
    assert audit.fallen_back == ()
    assert audit.integer >= 9
    inputs = random_rows(model.signature, 24)
    with tqdit.Denoiser.open(tmp_path / "model.engine") as denoise:
        assert_agrees(denoise(**inputs), apply(model, table)(inputs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_bits": "8/6"}, "--group-bits '8/6' are 2 numbers; .* has 3 groups"),
        ({"group_bits": "8/6/9"}, "--group-bits is '8/6/9'"),
        ({"group_bits": "8/x/4"}, "--group-bits is '8/x/4'"),
        ({"group_bits": "1"}, "--group-bits is '1'"),
        ({"time_groups": "none"}, "3 numbers; .* has 1 groups"),
    ],
)
def test_bits_that_do_not_fit_are_refused_before_any_work(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        calibrate(tiny_model(), replace(CONFIG, inputs="symmetric_bits", **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_table_with_other_bits_is_refused() -> None:
    table = make_table(tiny_model(), Kind(groups=3, everywhere=True, group_bits=True))
    site = table.by_module[LAYER]["input"]
    for wrong in (1, 9):
        bits = np.full(3, wrong, np.int32)
        with pytest.raises(FileFormatError, match=f"'{LAYER}.input.group_bits' holds {wrong}"):
            replace(table, sites=(replace(site, quantizer=replace(site.quantizer, group_bits=bits)),))
    with pytest.raises(FileFormatError, match="group_bits' is int64"):
        replace(table, sites=(replace(site, quantizer=replace(site.quantizer, group_bits=np.full(3, 4))),))
