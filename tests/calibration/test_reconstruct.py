"""Reconstruction: what is learned, that no block gets worse, and that the table says what was learned on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tqdit
from support import assert_agrees, few, tiny_model
from tqdit.calibration import reconstruct as phase
from tqdit.calibration.capture import Samples
from tqdit.calibration.config import PRESETS, QuantizationConfig
from tqdit.calibration.equalize import salience
from tqdit.calibration.flow import Calibration, calibrate
from tqdit.calibration.reconstruct import Learned, Replay, Rounding, StraightThrough, units_of
from tqdit.calibration.rows import CalibrationRows
from tqdit.cli.main import main
from tqdit.console import Console
from tqdit.errors import UsageError
from tqdit.models.loaded import LoadedModel
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.granularity import PerChannel
from tqdit.quantization.rounding import rounded
from tqdit.quantization.schemes.symmetric import Symmetric
from tqdit.quantization.table import ScaleTable, Site

SMALL = {"steps": 12, "groups": 3, "rows_per_group": 4, "chains": 2, "candidates": 20}
CONFIG = replace(PRESETS["q-diffusion"], weight_bits=4, iterations=40, **SMALL)
QUIET = Console(quiet=True)


def started(tmp_path: Path, config: QuantizationConfig = CONFIG) -> tuple[Calibration, CalibrationRows, ScaleTable]:
    """A calibration whose search is done."""
    run = Calibration(tiny_model(), config.for_model(tiny_model()), tmp_path, QUIET)
    rows = run.rows()
    return run, rows, run.search(rows)


def random_rounding() -> tuple[Rounding, Tensor]:
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32))
    scale = weight.abs().amax(1) / 7.5
    return Rounding.of(weight, Site("m", "weight", Symmetric(4, PerChannel(0), scale.numpy()))), weight


def test_soft_codes_begin_at_the_weight_and_hard_ones_are_its_neighbours() -> None:
    rounding, weight = random_rounding()
    soft = (rounding.codes(rounding.soft) * rounding.scale).detach()
    inside = (weight / rounding.scale).abs() < 7
    torch.testing.assert_close(soft[inside], weight[inside], rtol=0, atol=2e-4 * float(rounding.scale.max()))
    with torch.no_grad():
        rounding.up.copy_(torch.randn(rounding.up.shape, generator=torch.Generator().manual_seed(1)))
    steps = rounding.hard_codes - torch.floor(weight / rounding.scale)
    assert set(steps[inside].unique().tolist()) == {0, 1}
    assert rounding.hard_codes.min() >= -8
    assert rounding.hard_codes.max() <= 7


@pytest.mark.slow
def test_the_soft_share_and_its_penalty_are_those_of_adaround(tmp_path: Path) -> None:
    run, _, table = started(tmp_path)
    network = apply(run.model, table).network
    unit = units_of(run.model, table)[-1]
    learned = Learned(run.model, network, unit, {site.name: site for site in table.sites})  # type: ignore[arg-type]
    (up,) = learned.roundings
    h = np.clip(1.2 / (1 + np.exp(-up.detach().numpy().astype(np.float64))) - 0.1, 0, 1)
    for share in (0.3, 0.6, 0.999):
        exponent = 2 + 18 * (1 - (share - 0.2) / 0.8)
        expected = phase.PENALTY * np.mean(1 - np.abs(2 * h - 1) ** exponent)
        assert learned.penalty(share).item() == pytest.approx(expected, rel=1e-4)
    assert learned.penalty(0.1).item() == 0


def test_the_gradient_of_a_scale_is_that_of_lsq() -> None:
    x = np.random.default_rng(0).normal(size=200).astype(np.float32)
    scale, values = torch.tensor(0.31, requires_grad=True), torch.from_numpy(x).requires_grad_()
    with StraightThrough():
        rounded(values, scale, 3).sum().backward()
    code = x / np.float32(0.31)
    inside = (np.rint(code) >= -4) & (np.rint(code) <= 3)
    of_scale = np.where(inside, np.rint(code) - code, np.clip(np.rint(code), -4, 3))
    assert scale.grad is not None
    assert values.grad is not None
    assert float(scale.grad) == pytest.approx(float(of_scale.sum()), rel=1e-4)
    np.testing.assert_array_equal(values.grad.numpy(), inside)


@pytest.mark.slow
@pytest.mark.parametrize("preset", few(["q-diffusion", "tq-dit", "static", "gptq"], "q-diffusion", "static"))
def test_no_unit_gets_worse_and_what_is_learned_is_what_the_table_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    """With scales of one and of two regions, of groups of timesteps, and of tokens."""
    config = replace(PRESETS[preset], method="reconstruct", weight_bits=4, iterations=40, **SMALL)
    run, rows, table = started(tmp_path, config)
    model, errors, error = run.model, [], Replay.error

    def heard(self: Replay, calls: Any, tensors: Any) -> float:
        errors.append(error(self, calls, tensors))
        return errors[-1]

    monkeypatch.setattr(Replay, "error", heard)
    found = run.reconstruct(table, rows)
    units = units_of(model, table)
    assert [unit.name for unit in units] == [
        "t_embedder.mlp.0", "t_embedder.mlp.2", "x_embedder.proj", "blocks.0", "blocks.1",
        "final_layer.adaLN_modulation.1", "final_layer.linear",
    ]  # fmt: skip
    folded, _ = phase.fold(model, table)
    replays, lower = iter(list(zip(errors[::2], errors[1::2], strict=True))), 0
    monkeypatch.setattr(Replay, "error", error)
    for unit in units:
        before, after = next(replays)
        quantized, network = apply(model, found), apply(model, found).network
        calls = phase.record(folded, quantized, unit, rows, [torch.arange(len(rows))])
        assert error(Replay(network, unit, quantized), calls, {}) == pytest.approx(min(before, after), rel=1e-3)
        lower += after < before
    assert lower >= 4
    for site in found.sites:
        kind = type(site.quantizer)
        assert kind is type(table.by_module[site.module][site.role].quantizer)
        if site.role == "weight" and site.codes is not None:
            q = 2 ** (site.quantizer.bits - 1)
            assert site.codes.min() >= -q
            assert site.codes.max() < q
    assert any(site.codes is not None for site in found.sites)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_unit_it_was_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, iterations=5)
    whole = calibrate(tiny_model(), config, tmp_path / "a").table.to_bytes()
    learned: list[str] = []
    reconstruct_unit = phase.reconstruct_unit

    def limited(model: LoadedModel, quantized: LoadedModel, table: ScaleTable, unit: Any, *rest: Any) -> Any:
        if len(learned) == 4:
            raise KeyboardInterrupt
        learned.append(unit.name)
        return reconstruct_unit(model, quantized, table, unit, *rest)

    monkeypatch.setattr(phase, "reconstruct_unit", limited)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_model(), config, tmp_path / "b")
    learned.append("killed")
    assert calibrate(tiny_model(), config, tmp_path / "b").table.to_bytes() == whole
    assert len(set(learned)) == len(learned) == 8


@pytest.mark.slow
def test_more_bytes_than_may_be_held_leave_batches_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rows, table = started(tmp_path)
    quantized, unit = apply(run.model, table), units_of(run.model, table)[3]
    batches = list(torch.arange(len(rows)).split(4))
    assert len(phase.record(run.model, quantized, unit, rows, batches)) == 3
    monkeypatch.setattr(phase, "RECORDED_BYTES", 1)
    assert len(phase.record(run.model, quantized, unit, rows, batches)) == 1


@pytest.mark.slow
def test_a_unit_that_the_network_calls_twice_is_learned_on_both_calls(tmp_path: Path) -> None:
    run, rows, table = started(tmp_path)
    network = run.model.network
    block = network.get_submodule("blocks.0")
    network.blocks.append(block)  # type: ignore[union-attr, operator]
    try:
        quantized = apply(tiny_model(), table)
        inner = quantized.network.network
        inner.blocks.append(inner.get_submodule("blocks.0"))  # type: ignore[union-attr, operator]
        unit = units_of(tiny_model(), table)[3]
        calls = phase.record(run.model, quantized, unit, rows, list(torch.arange(len(rows)).split(6)))
    finally:
        del network.blocks[2]  # type: ignore[union-attr, operator]
    assert len(calls) == 4
    assert not torch.equal(calls[0].target[0], calls[1].target[0])


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(["onnxruntime", "openvino"], "onnxruntime"))
def test_an_engine_of_what_was_learned_multiplies_integers(tmp_path: Path, backend: str) -> None:
    model = tiny_model()
    table = calibrate(model, replace(PRESETS["ptq4dit"], iterations=20, **SMALL), tmp_path / "work").table
    assert any(site.codes is not None for site in table.sites)
    tqdit.export(model, tmp_path / "model.onnx", scales=table)
    manifest = tqdit.build(tmp_path / "model.onnx", tmp_path / "model.engine", backend=backend)
    assert manifest.audit is not None
    assert manifest.audit.fallen_back == ()
    assert table.golden is not None
    with tqdit.Denoiser.open(tmp_path / "model.engine") as denoise:
        assert_agrees(denoise(**table.golden.inputs), apply(model, table)(table.golden.inputs))


def test_salience_is_ptq4dits() -> None:
    rng = np.random.default_rng(0)
    rows, width, steps = 12, 9, 3
    group, weight = np.arange(rows) // 4, rng.normal(size=(5, width)).astype(np.float32)
    low, high = -np.exp(rng.normal(size=(2, rows, width))).astype(np.float32)
    high, weight[:, 1] = -high, weight[:, 0]  # two channels share a rank

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])

    s_w = np.abs(weight).max(0)
    s_x = np.stack([np.maximum(-low, high)[group == t].max(0) for t in range(steps)])
    rho = np.array([np.corrcoef(ranks(each), ranks(s_w))[0, 1] for each in s_x])
    share = np.exp(-rho) / np.exp(-rho).sum()
    expected = np.sqrt((share[:, None] * s_x).sum(0) / s_w)
    expected /= np.exp(np.log(expected).mean())
    samples = Samples(torch.zeros(rows, 1, width), None, torch.zeros(rows, 1, 5), {},
                      (torch.from_numpy(low), torch.from_numpy(high)))  # fmt: skip
    found = salience(samples, torch.from_numpy(weight), torch.from_numpy(group))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_salience_of_channels_that_are_all_alike_divides_by_one() -> None:
    samples = Samples(torch.zeros(4, 1, 3), None, torch.zeros(4, 1, 5), {}, (-torch.ones(4, 3), torch.ones(4, 3)))
    found = salience(samples, torch.ones(5, 3), torch.arange(4) // 2)
    torch.testing.assert_close(found, torch.ones(3))


def test_equalize_keeps_the_meaning_of_earlier_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert QuantizationConfig(equalize=True).equalize == "range"  # type: ignore[arg-type]
    assert QuantizationConfig.of_settings({"equalize": False}).equalize == "none"
    for flags, expected in ((["--equalize"], "range"), (["--equalize", "salience"], "salience"), ([], "none")):
        assert main(["calibrate", "demo", "--print", *flags]) == 0
        assert f"equalize             {expected}\n" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"--equalize is 'smooth'.*range, salience"):
        QuantizationConfig(equalize="smooth")
    with pytest.raises(UsageError, match="--iterations is 0"):
        QuantizationConfig(iterations=0)
