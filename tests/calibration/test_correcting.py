"""PTQD's correction as a calibration finds it: against NumPy, in every loop, and where it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

import tqdit
from support import tiny_model
from tqdit.calibration import correcting
from tqdit.calibration.config import PRESETS
from tqdit.calibration.correcting import fit
from tqdit.calibration.flow import calibrate
from tqdit.calibration.placing import Placing
from tqdit.cli.main import main
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.step_batcher import StepBatcher
from tqdit.errors import FileFormatError, SamplingError, UsageError
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.table import ScaleTable, read_scale_table, write_scale_table

SMALL = {"steps": 12, "groups": 3, "rows_per_group": 4, "chains": 2, "candidates": 20}
CONFIG = replace(PRESETS["min-max"], correction=True, weight_bits=4, **SMALL)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ScaleTable:
    return calibrate(tiny_model(), CONFIG, tmp_path_factory.mktemp("work")).table


def test_the_fit_is_the_regression_of_the_error_on_the_prediction() -> None:
    rng = np.random.default_rng(0)
    eps = rng.normal(0.3, 1, (6, 3, 5, 5)).astype(np.float32)
    bias = np.array([0.1, -0.2, 0.05], np.float32)
    found = eps * np.float32(1.07) + bias[:, None, None] + rng.normal(0, 0.02, eps.shape).astype(np.float32)
    slope, biases, deviation = fit(eps, found)
    error = (found - eps).astype(np.float64)
    expected = np.polyfit(eps.ravel().astype(np.float64), error.ravel(), 1)[0]
    assert slope == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(biases, (error - slope * eps).mean(axis=(0, 2, 3)), rtol=1e-5)
    left = (found - biases[:, None, None]) / (1 + slope) - eps
    assert deviation == pytest.approx(np.sqrt(np.mean(left**2)), rel=1e-4)
    assert np.mean(left**2) < 0.1 * np.mean(error**2)
    assert fit(eps, eps * np.float32(0.9))[0] == 0  # a slope below 0 is not taken back
    assert fit(0 * eps, found)[0] == 0


@pytest.mark.slow
def test_a_table_with_a_correction_comes_back_from_its_file(table: ScaleTable, tmp_path: Path) -> None:
    correction = table.correction
    assert correction is not None
    assert len(correction.timesteps) == 12
    assert len(correction.bias[0]) == 4
    assert correction.guidance_scale == table.guidance_scale
    write_scale_table(tmp_path / "scales.safetensors", table)
    assert read_scale_table(tmp_path / "scales.safetensors") == table
    content = table.to_bytes().replace(b'slope\\":[', b'slope\\":[1,')
    size = int.from_bytes(content[:8], "little") + 2
    (tmp_path / "damaged.safetensors").write_bytes(size.to_bytes(8, "little") + content[8:])
    with pytest.raises(FileFormatError, match="a correction at 12 timesteps"):
        read_scale_table(tmp_path / "damaged.safetensors")


@pytest.mark.slow
def test_a_killed_measurement_goes_on_and_ends_with_the_same_bytes(
    table: ScaleTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, whole = [0], correcting.fit

    def killed(*predictions: np.ndarray) -> tuple:
        calls[0] += 1
        if calls[0] == 7:
            raise KeyboardInterrupt
        return whole(*predictions)

    monkeypatch.setattr(correcting, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_model(), CONFIG, tmp_path)
    assert calibrate(tiny_model(), CONFIG, tmp_path).table.to_bytes() == table.to_bytes()
    assert calls[0] == 12 + 1


@pytest.mark.slow
def test_sampler_and_batcher_take_the_same_errors_back_at_the_scale_that_they_were_measured_at(
    table: ScaleTable,
) -> None:
    model = tiny_model()
    quantized = apply(model, table)
    plain = Sampler(model.card(), quantized, None, 4)
    corrected = Sampler(replace(model.card(), correction=table.correction), quantized, None, 4)
    scale = table.guidance_scale
    chains = {"seed": 1, "steps": 12}
    found = corrected.sample_latents([1, 2], scale, **chains)
    assert not np.array_equal(found, plain.sample_latents([1, 2], scale, **chains))
    np.testing.assert_array_equal(
        corrected.sample_latents([1, 2], scale + 1, **chains), plain.sample_latents([1, 2], scale + 1, **chains)
    )
    with StepBatcher(corrected, batch=3) as batcher:
        futures = [
            batcher.submit(label, guidance_scale=scale, seed=1, image_index=i, steps=12)
            for i, label in enumerate([1, 2])
        ]
        np.testing.assert_array_equal(np.stack([future.result() for future in futures]), found)


@pytest.mark.slow
def test_an_export_carries_the_correction_and_a_step_graph_is_refused(table: ScaleTable, tmp_path: Path) -> None:
    model = tiny_model()
    tqdit.export(model, tmp_path / "model.onnx", scales=table)
    manifest = tqdit.build(tmp_path / "model.onnx", tmp_path / "model.engine", backend="onnxruntime")
    assert manifest.card.correction == table.correction
    with Sampler.open(tmp_path / "model.engine") as sampler:
        assert sampler.card.correction == table.correction
    with pytest.raises(UsageError, match="step graph"):
        tqdit.export(model, tmp_path / "step.onnx", scales=table, graph="step")
    path = tmp_path / "noise.safetensors"
    flags = ["-n", "1", "-o", str(tmp_path / "out.npz"), "--save-noise", str(path)]
    assert main(["sample", str(tmp_path / "model.engine"), *flags]) == 2
    assert not path.exists()


@pytest.mark.slow
def test_a_chain_with_two_calls_at_a_timestep_has_the_mean_of_both(tmp_path: Path) -> None:
    model = tiny_model()
    model = replace(model, sampling=replace(model.sampling, sampler="heun", steps=11))
    correction = calibrate(model, replace(CONFIG, steps=11), tmp_path).table.correction
    assert correction is not None
    assert len(correction.timesteps) == 6
    assert min(correction.deviation) > 0


@pytest.mark.slow
def test_a_quantized_network_that_predicts_no_numbers_is_refused(
    table: ScaleTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correcting, "fit", lambda *_: (0.0, np.full(4, np.nan), 0.0))
    with pytest.raises(SamplingError, match="quantized network"):
        calibrate(tiny_model(), CONFIG, tmp_path)


def test_biases_of_other_channels_are_refused_by_an_export(table: ScaleTable, tmp_path: Path) -> None:
    assert table.correction is not None
    bias = tuple(row[:2] for row in table.correction.bias)
    altered = replace(table, correction=msgspec.structs.replace(table.correction, bias=bias))
    with pytest.raises(UsageError, match="2 channels"):
        tqdit.export(tiny_model(), tmp_path / "model.onnx", scales=altered)


@pytest.mark.slow
def test_placed_steps_are_checked_with_the_correction_that_an_engine_has(
    table: ScaleTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    def run(self: Placing, quantized: object, meter: object) -> None:
        given.append(self.correction)

    monkeypatch.setattr(Placing, "run", run)
    calibrate(tiny_model(), replace(CONFIG, calls=3), tmp_path)
    assert given == [table.correction]
