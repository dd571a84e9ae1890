"""Rotations, branches of low rank and divisors: exact in float, named layers, and what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import tqdit
from networks import Parallel, Tokens, described
from support import assert_agrees, few, tiny_model
from tables import random_rows
from tqdit.bounds import BLOCKS
from tqdit.calibration.config import PRESETS, QuantizationConfig
from tqdit.calibration.flow import Calibration, calibrate
from tqdit.calibration.low_rank import find_branch
from tqdit.calibration.without_rows import table_without_rows
from tqdit.cli.main import main
from tqdit.console import Console
from tqdit.errors import FileFormatError, UsageError
from tqdit.evaluate.layers import Diagnosis
from tqdit.models.loaded import LoadedModel
from tqdit.models.rewrites import Rewrites, rewrite
from tqdit.models.rotation import block_of, hadamard, rotate
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.fold import fold
from tqdit.quantization.summary import facts
from tqdit.quantization.table import ScaleTable, read_scale_table, write_scale_table

SMALL = {"steps": 12, "groups": 1, "rows_per_group": 8, "chains": 2, "candidates": 20}
LAYERS = [f"blocks.{block}.{name}" for block in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
Calibrated = tuple[LoadedModel, ScaleTable]
FC2 = "blocks.0.mlp.fc2"  # (16, 64): nothing can divide its input in advance


def tensors_for(model: LoadedModel, keys: tuple[str, ...], rank: int = 2) -> dict[str, dict[str, Tensor]]:
    """Random tensors of every layer's rewrites."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in LAYERS:
        rows, width = model.network.get_submodule(name).weight.shape
        shapes = {"divisor": (width,), "up": (rows, rank), "down": (rank, width)}
        drawn = {key: torch.rand(shape, generator=generator) + 0.5 for key, shape in shapes.items()}
        divides = not next(product for product in model.products if product.name == name).folds
        found[name] = {key: drawn[key] for key in keys if key != "divisor" or divides}
    return {name: own for name, own in found.items() if own}


def numpy_hadamard(size: int) -> NDArray[np.float64]:
    """Kronecker powers of J / 2 - P, P the reversed identity."""
    found = np.ones((1, 1))
    while len(found) < size:
        found = np.kron(found, np.ones((4, 4)) / 2 - np.eye(4)[::-1])
    return found


@pytest.mark.parametrize("size", BLOCKS)
def test_blocks_are_regular_hadamard_matrices(size: int) -> None:
    matrix = hadamard(size)
    np.testing.assert_array_equal(matrix.numpy(), numpy_hadamard(size))
    assert matrix.dtype == torch.float32
    assert set(matrix.abs().unique().tolist()) == {size**-0.5}
    assert torch.equal(matrix, matrix.t())
    assert torch.equal(matrix @ matrix, torch.eye(size))
    assert torch.equal(matrix.sum(0), torch.ones(size))  # no row of ones, which would gather the mean


def test_a_rotation_spreads_a_large_channel_and_keeps_a_mean() -> None:
    x = torch.zeros(1, 64)
    x[0, 5] = 8
    assert rotate(x, hadamard(64)).abs().unique().tolist() == [1.0]
    assert torch.equal(rotate(torch.ones(1, 64), hadamard(64)), torch.ones(1, 64))


@pytest.mark.parametrize(
    ("width", "most", "expected"),
    [
        (1152, 256, 64),
        (1152, 64, 64),
        (1152, 16, 16),
        (512, 256, 256),
        (128, 256, 64),
        (72, 64, 4),
        (70, 64, 0),
        (64, 0, 0),
    ],
)
def test_the_largest_block_that_divides_the_width(width: int, most: int, expected: int) -> None:
    assert block_of(width, most) == expected


@pytest.mark.parametrize("origin", ["published", "diffusers"])
@pytest.mark.parametrize(
    "rewrites",
    [Rewrites(rotate=16), Rewrites(rotate=256), Rewrites(rank=2), Rewrites(divide=True), Rewrites(16, 64, 2, True)],
    ids=str,
)
def test_a_rewritten_network_computes_the_same(origin: str, rewrites: Rewrites) -> None:
    model = tiny_model(origin)
    given = {}
    if origin == "published":
        keys = (*(("divisor",) if rewrites.divide else ()), *(("up", "down") if rewrites.rank else ()))
        given = tensors_for(model, keys)
    found = rewrite(model, rewrites, given)
    inputs = random_rows(model.signature, 4)
    np.testing.assert_allclose(found(inputs), model(inputs), rtol=1e-4, atol=1e-5)
    assert found.fingerprint == model.fingerprint
    renamed = [product.name for product in found.products if ".core" in product.name]
    assert renamed
    assert all(found.network.get_submodule(name) is not None for name in renamed)
    assert rewrite(found, rewrites).network is found.network  # what is rewritten stays as it is


def test_the_weight_of_a_core_is_that_of_numpy() -> None:
    model = tiny_model()
    rewrites = Rewrites(rotate=16, rank=2, divide=True)
    given = tensors_for(model, ("divisor", "up", "down"))
    core = rewrite(model, rewrites, given).network.get_submodule(f"{FC2}.core").weight
    own = {key: tensor.double().numpy() for key, tensor in given[FC2].items()}
    weight = model.network.get_submodule(FC2).weight.double().numpy() * own["divisor"]
    expected = weight @ np.kron(np.eye(4), numpy_hadamard(16)) - own["up"] @ own["down"]
    np.testing.assert_allclose(core.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_only_blocks_are_rewritten_and_nothing_is_drawn() -> None:
    model = tiny_model()
    before = torch.get_rng_state()
    found = rewrite(model, Rewrites(rotate=16, rank=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert {product.name for product in found.products if product.name.endswith(".core")} == {
        f"{name}.core" for name in LAYERS
    }
    assert rewrite(model, Rewrites()) is model
    assert rewrite(model, Rewrites(rank=1000)).network.get_submodule(FC2).down.out_features == 2  # 16 / 8


@pytest.mark.slow
def test_a_rotated_gelu_is_no_gelu() -> None:
    model = tiny_model()
    made_by = {rotate: [product.made_by for product in rewrite(model, Rewrites(rotate=rotate, rank=2)).products
                        if product.name == f"{FC2}.core"] for rotate in (0, 16)}  # fmt: skip
    assert made_by == {0: ["gelu"], 16: [None]}


# branches ------------------------------------------------------------------------------------------------------------


def weights(rows: int, width: int) -> Tensor:
    """With a decaying spectrum."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((size, size)))[0] for size in (rows, width))
    count = min(rows, width)
    return torch.from_numpy((left[:, :count] * (0.8 ** np.arange(count))) @ right[:count]).float()


@pytest.mark.parametrize("shape", [(48, 32), (32, 96)])
def test_a_branch_beats_the_truncated_svd_of_numpy(shape: tuple[int, int]) -> None:
    """Ten lines of NumPy: the best approximation, the rest rounded. Turns with the rounding may only improve it."""
    weight = weights(*shape)
    u, s, vt = np.linalg.svd(weight.double().numpy())
    rest = weight.double().numpy() - (u[:, :4] * s[:4]) @ vt[:4]

    def error(rest: NDArray[np.float64]) -> float:
        total = 0.0
        for part in np.split(rest, 2, axis=1):
            scale = np.abs(part).max(1, keepdims=True) / 7.5
            total += float(((np.clip(np.round(part / scale), -8, 7) * scale - part) ** 2).sum())
        return total

    up, down = find_branch(weight, 4, 4, [shape[1] // 2] * 2)
    assert (up.dtype, down.dtype, up.shape, down.shape) == (torch.float16, torch.float16, (shape[0], 4), (4, shape[1]))
    found = weight.double().numpy() - up.double().numpy() @ down.double().numpy()
    assert error(found) < 0.98 * error(rest)
    assert error(rest) < 0.5 * error(weight.double().numpy())
    again = find_branch(weight, 4, 4, [shape[1] // 2] * 2)
    assert torch.equal(again[0], up)
    assert torch.equal(again[1], down)


def test_a_branch_of_a_weight_of_low_rank_leaves_nothing() -> None:
    weight = weights(24, 16)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    weight = (u[:, :2] * s[:2]) @ vt[:2]
    up, down = find_branch(weight, 2, 4, [16])
    torch.testing.assert_close(up.float() @ down.float(), weight, rtol=0, atol=2e-3)
    up, down = find_branch(torch.zeros(24, 16), 2, 4, [16])
    assert not (up.float() @ down.float()).any()


# calibrations --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["vidit-q", "svdquant"])
def calibrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    model = tiny_model()
    table = calibrate(model, replace(PRESETS[request.param], **SMALL), tmp_path_factory.mktemp("work")).table
    return model, table


@pytest.mark.slow
def test_a_table_holds_what_its_network_is_made_with(calibrated: Calibrated, tmp_path: Path) -> None:
    model, table = calibrated
    rank = table.settings["rank"]
    assert set(table.layers) <= set(LAYERS)
    assert all(("up" in own) == bool(rank) for own in table.layers.values())
    assert any("divisor" in own for own in table.layers.values())
    assert all(site.divisor is None for site in table.sites if site.module.startswith("blocks"))
    assert any(site.module.startswith(f"{FC2}.core") for site in table.sites)
    write_scale_table(tmp_path / "scales.safetensors", table)
    assert read_scale_table(tmp_path / "scales.safetensors") == table
    folded, plain = fold(model, table)
    inputs = random_rows(model.signature, 4)
    np.testing.assert_allclose(folded(inputs), model(inputs), rtol=1e-4, atol=1e-5)
    assert not plain.layers
    np.testing.assert_array_equal(apply(folded, plain)(inputs), apply(model, table)(inputs))


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(["onnxruntime", "openvino"], "onnxruntime"))
def test_an_engine_multiplies_every_core_as_integers(calibrated: Calibrated, tmp_path: Path, backend: str) -> None:
    model, table = calibrated
    tqdit.export(model, tmp_path / "model.onnx", scales=table)
    manifest = tqdit.build(tmp_path / "model.onnx", tmp_path / "model.engine", backend=backend)
    assert manifest.audit is not None
    assert manifest.audit.fallen_back == ()
    assert manifest.audit.integer == len(LAYERS) + 1  # and the final layer
    inputs = random_rows(model.signature, 24)
    with tqdit.Denoiser.open(tmp_path / "model.engine") as denoise:
        assert_agrees(denoise(**inputs), apply(model, table)(inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        {"method": "gptq", "rotate": 16, "columns": 32, "rank": 2, "equalize": True},
        {"inputs": "asymmetric", "rotate": 4, "rank": 2, "equalize": True, "equalize_all": True, "time_groups": "all"},
    ],
    ids=["gptq", "search"],
)
def test_every_method_works_on_rewritten_layers(tmp_path: Path, knobs: dict[str, object]) -> None:
    model = tiny_model()
    config = replace(PRESETS["fast"], **{**SMALL, "groups": 3, "rows_per_group": 4}, **knobs)
    table = calibrate(model, config, tmp_path / "work").table
    assert set(table.errors) == set(table.by_module)
    assert table.golden is not None
    assert table.golden.errors.mean() < 0.2
    assert calibrate(model, config, tmp_path / "work").table == table  # from what the first run left on disk
    assert calibrate(model, config, tmp_path / "other").table == table


@pytest.mark.slow
def test_a_table_computes_the_same_bits_before_it_is_written_and_after(tmp_path: Path) -> None:
    model = tiny_model()
    table = table_without_rows(model, replace(PRESETS["dynamic"], rank=2, weight_bits=4))
    write_scale_table(tmp_path / "scales.safetensors", table)
    read = read_scale_table(tmp_path / "scales.safetensors")
    assert all(array.flags.c_contiguous for own in table.layers.values() for array in own.values())
    inputs = random_rows(model.signature, 8)
    np.testing.assert_array_equal(apply(model, table)(inputs), apply(model, read)(inputs))


@pytest.mark.slow
def test_parts_of_a_networks_own_are_rewritten_and_mend_one_another(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = described(Tokens(Parallel()), (4, 6))
    config = replace(PRESETS["gptq"], **{**SMALL, "rows_per_group": 4}, rank=2)
    run = Calibration(model, config, tmp_path, Console(quiet=True))
    table = run.search(run.rows())
    assert {f"body.proj_out.columns.{part}.core" for part in (0, 1)} <= set(table.by_module)
    assert run.carried is not None
    assert list(run.carried) == ["body.proj_out.columns.2.core"]  # what is left after the last part


@pytest.mark.slow
def test_a_rotation_and_a_branch_help_where_channels_are_uneven() -> None:
    """A network with large channels, without a calibration: the errors of its golden calls at 4 bits."""
    model = tiny_model()
    for name in LAYERS:
        model.network.get_submodule(name).weight[:, 3] *= 20
    dynamic, errors = replace(PRESETS["dynamic"], weight_bits=4), {}
    for knobs in ({}, {"rotate": 16}, {"rank": 2}):
        golden = table_without_rows(model, replace(dynamic, **knobs)).golden
        assert golden is not None
        errors[tuple(knobs)] = golden.errors.mean()
    assert errors["rotate",] < 0.7 * errors[()]
    assert errors["rank",] < 0.7 * errors[()]


def test_inspecting_tells_of_rewrites(
    calibrated: Calibrated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, table = calibrated
    write_scale_table(tmp_path / "scales.safetensors", table)
    assert main(["inspect", str(tmp_path / "scales.safetensors")]) == 0
    said = capsys.readouterr().out
    assert ("of up to 64 channels" in said) == bool(table.settings["rotate"])
    assert ("beside 8 layer(s), of rank 2 to 2, float" in said) == bool(table.settings["rank"])
    assert "columns  " not in said  # these layers are narrower than a group


@pytest.mark.slow
def test_inspecting_tells_of_groups_of_columns() -> None:
    table = table_without_rows(tiny_model(), replace(PRESETS["dynamic"], rank=2, columns=8))
    assert "8 layer(s), each a sum of 2 to 8 products" in dict(facts(table))["columns"]


def test_layers_of_a_rewritten_network_are_diagnosed(calibrated: Calibrated, tmp_path: Path) -> None:
    model, table = calibrated
    diagnosis = Diagnosis(model, table, tmp_path, Console(quiet=True), images=2)
    assert set(table.by_module) <= set(diagnosis.products)
    assert 0 < diagnosis.base.mean() < 0.1


# what does not fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"rotate": 32}, "--rotate is 32; expected 4, 16, 64, 256"),
        ({"rotate": -4}, "--rotate"),
        ({"rotate": 1024}, "--rotate"),
        ({"rank": -1}, "--rank"),
        ({"rank": 1 << 12}, "--rank"),
        ({"equalize_all": True}, "--equalize-all.*--equalize"),
    ],
)
def test_knobs_that_cannot_be_are_refused(knobs: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        QuantizationConfig(**knobs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("knobs", "name", "meant"),
    [
        ({"rank": 2}, "blocks.0.attn.qkv:weight_bits=4", "blocks.0.attn.qkv.core"),
        ({"rank": 2}, "blocks.1.mlp.fc2:columns=4", "blocks.1.mlp.fc2.core"),
        ({}, "blocks.1.mlp.fc2.core:columns=4", "blocks.1.mlp.fc2"),
        ({"columns": 8}, "blocks.0.attn.proj.columns.7:weight_bits=4", "blocks.0.attn.proj.columns.0"),
    ],
)
def test_a_wrong_name_of_a_layer_is_answered_with_the_nearest_one(knobs: dict[str, Any], name: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"'{meant}'"):
        table_without_rows(tiny_model(), replace(PRESETS["dynamic"], overrides=name, **knobs))


def test_presets_that_divide_need_a_calibration() -> None:
    model = tiny_model()
    for name in ("vidit-q", "svdquant"):
        with pytest.raises(UsageError, match=f"'{name}' needs a calibration"):
            tqdit.export(model, "model.onnx", preset=name)
        with pytest.raises(UsageError, match="--equalize needs calibration rows"):
            table_without_rows(model, PRESETS[name])


def test_tables_that_do_not_fit_are_refused() -> None:
    model = tiny_model()
    table = table_without_rows(model, replace(PRESETS["dynamic"], rank=2))
    own = table.layers[FC2]
    wrong = {
        "without a branch": {name: own for name, own in table.layers.items() if name != FC2},
        "of another rank": {**table.layers, FC2: {"up": own["up"][:, :1], "down": own["down"][:1]}},
        "with a divisor": {**table.layers, FC2: {**own, "divisor": np.ones(64, np.float32)}},
    }
    for layers in wrong.values():
        with pytest.raises(UsageError, match=FC2):
            apply(model, replace(table, layers=layers))
    with pytest.raises(UsageError, match=r"'layer.blocks.7'"):
        apply(model, replace(table, layers={**table.layers, "blocks.7": own}))
    for setting in ("rotate", "rank"):
        with pytest.raises(FileFormatError, match=f"setting '{setting}'"):
            apply(model, replace(table, settings={**table.settings, setting: "16"}))
    with pytest.raises(UsageError, match=r"names 'blocks.0.attn.qkv.core', which the network lacks"):
        apply(model, replace(table, settings={**table.settings, "rank": 0}, layers={}))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "expected divisor, or up and down"),
        ({"up": np.ones((4, 2), np.float16)}, "has up, expected"),
        ({"sideways": np.ones(4, np.float32)}, "has sideways, expected"),
        ({"divisor": np.zeros(4, np.float32)}, r"layer.fc.divisor' holds 0"),
        ({"up": np.ones((4, 2), np.float32), "down": np.ones((2, 4), np.float16)}, r"layer.fc.up' is float32\[4, 2\]"),
        ({"up": np.ones((4, 2), np.float16), "down": np.full((2, 4), np.nan, np.float16)}, r"layer.fc.down' holds NaN"),
    ],
)
def test_damaged_tensors_of_layers_are_refused(arrays: dict[str, NDArray[np.float32]], words: str) -> None:
    table = table_without_rows(tiny_model(), PRESETS["dynamic"])
    with pytest.raises(FileFormatError, match=words):
        replace(table, layers={"fc": arrays})
