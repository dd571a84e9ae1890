"""The whole calibration of a tiny model: presets, what is quantized, resuming, and the command."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

from support import few, tiny_model
from tqdit.calibration import capture, flow, layers
from tqdit.calibration.config import PRESETS, QuantizationConfig
from tqdit.calibration.flow import calibrate
from tqdit.calibration.rows import CalibrationRows, Trajectory, every_state, pick, sampling_of
from tqdit.calibration.work import WorkFolder
from tqdit.cli.main import main
from tqdit.console import Console
from tqdit.errors import UsageError
from tqdit.evaluate.paired import relative_errors
from tqdit.models.dit import randomize
from tqdit.models.families import diffusers
from tqdit.models.load import load_model
from tqdit.models.loaded import LoadedModel
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.granularity import PerTensor, PerTimestepGroup
from tqdit.quantization.table import ScaleTable, read_scale_table

SMALL = {"steps": 12, "groups": 3, "rows_per_group": 4, "chains": 2, "candidates": 20, "iterations": 10}


def final_samples(model: LoadedModel, **knobs: object) -> np.ndarray:
    """x_0 of chains with seeded noise and requests, (images, C, ...)."""
    config = QuantizationConfig(guidance_scale=1.5, **knobs)
    trajectory = Trajectory(model, config, every_state(sampling_of(model, config), config))
    trajectory.run()
    return trajectory.chains.x.copy()


@torch.no_grad()
def eps_error_of(model: LoadedModel, table: ScaleTable, rows: CalibrationRows) -> float:
    """Squared error of the prediction on given rows, relative to its energy."""
    a, b = (each.call(rows.inputs)[:, : model.signature.channels] for each in (model, apply(model, table)))
    return float((a - b).square().sum() / a.square().sum())


def eps_error(model: LoadedModel, table: ScaleTable) -> float:
    state, time, request = model.signature.names
    generator = torch.Generator().manual_seed(0)
    inputs = {
        state: torch.randn(6, 4, 8, 8, generator=generator), time: torch.arange(6) * 180, request: torch.arange(6)
    }  # fmt: skip
    with torch.no_grad():
        a, b = model.call(inputs)[:, :4], apply(model, table).call(inputs)[:, :4]
    return float((a - b).square().sum() / a.square().sum())


LIKE_OTHERS = {"ho", "ho+mrq", "mse", "paper", "ptqd"}  # presets whose every method another preset has, too


@pytest.mark.slow
@pytest.mark.parametrize("preset", few(PRESETS, *(name for name in PRESETS if name not in LIKE_OTHERS)))
def test_every_preset_gives_a_table_that_works(tmp_path: Path, preset: str) -> None:
    model = tiny_model()
    table = calibrate(model, replace(PRESETS[preset], **SMALL), tmp_path).table
    assert eps_error(model, table) < 0.25  # random weights quantize badly
    assert table.groups == 3
    if preset in ("dynamic", "q-dit", "vidit-q", "svdquant"):  # attention stays float
        assert not any(site.role in ("left", "right") for site in table.sites)
        assert bool(table.layer_columns) == (preset == "q-dit")
        return
    softmax = table.by_module["blocks.0.attn.value_product"]["left"].quantizer
    if preset != "fast":  # which chooses
        assert softmax.scheme == ("symmetric" if PRESETS[preset].softmax == "uniform" else "softmax")
        grouped = preset in ("tq-dit", "paper", "static", "gptq", "best", "adatsq")
        assert softmax.granularity == (PerTimestepGroup(3) if grouped else PerTensor())
    assert set(table.errors) == set(table.by_module)


@pytest.mark.slow
@pytest.mark.parametrize("origin", few(["published", "diffusers"], "published"))
def test_more_bits_give_less_error(tmp_path: Path, origin: str) -> None:
    model = tiny_model(origin)
    errors = []
    for bits in (8, 6, 4):
        config = replace(PRESETS["tq-dit"], weight_bits=bits, activation_bits=bits, **SMALL)
        errors.append(eps_error(model, calibrate(model, config, tmp_path).table))
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.slow
def test_the_chain_of_a_quantized_model_stays_close_to_the_float_one(tmp_path: Path) -> None:
    model = tiny_model()
    table = calibrate(model, replace(PRESETS["tq-dit"], **SMALL), tmp_path).table
    chains = {"steps": 12, "chains": 3, "seed": 5}
    reference, found = final_samples(model, **chains), final_samples(apply(model, table), **chains)
    assert 0 < relative_errors(reference, found).mean() < 0.1


@pytest.mark.slow
def test_weights_rounded_with_error_feedback_travel_as_codes(tmp_path: Path) -> None:
    model, config = tiny_model(), replace(PRESETS["tq-dit"], weight_bits=4, token_share=1.0, **SMALL)
    nearest = calibrate(model, config, tmp_path).table
    rounded = calibrate(model, replace(config, method="gptq"), tmp_path).table
    codes = rounded.by_module["blocks.0.attn.qkv"]["weight"].codes
    assert codes is not None
    assert codes.shape == (48, 16)
    assert sum(rounded.errors.values()) < sum(nearest.errors.values())


@pytest.mark.slow
def test_parts_of_a_layer_mend_what_the_parts_before_them_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a kill between two of them changes nothing."""
    model = tiny_model()
    config = replace(PRESETS["gptq"], columns=4, weight_bits=4, attention=False, **SMALL)
    together = calibrate(model, config, tmp_path / "a").table
    solve, calls = flow.Calibration.solve, []

    def dies(self: flow.Calibration, entry: layers.LayerPlan, *given: object) -> object:
        calls.append(entry.name)
        if entry.name == "blocks.0.mlp.fc2.columns.7" and calls.count(entry.name) == 1:
            raise KeyboardInterrupt
        return solve(self, entry, *given)

    monkeypatch.setattr(flow.Calibration, "solve", dies)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, config, tmp_path / "b")
    assert calibrate(model, config, tmp_path / "b").table == together
    assert calls.count("blocks.0.mlp.fc1.columns.3") == 1
    assert calls.count("blocks.0.mlp.fc2.columns.0") == 2

    monkeypatch.setattr(flow.Problem, "left_over", lambda self, _: torch.zeros_like(self.target))
    apart = calibrate(model, config, tmp_path / "c").table
    assert together.golden is not None
    assert apart.golden is not None
    assert together.golden.errors.mean() < 0.8 * apart.golden.errors.mean()


@pytest.mark.slow
def test_equalised_channels_leave_less_error_where_channels_differ(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():  # the conditioning makes one channel of fc1's input twenty times as large as the others
        model.network.get_submodule("blocks.0.adaLN_modulation.1").bias[4 * 16 + 3] += 20
    config = replace(PRESETS["tq-dit"], activation_bits=6, **SMALL)
    plain = calibrate(model, config, tmp_path / "a").table
    equalised = calibrate(model, replace(config, equalize=True), tmp_path / "b").table
    divisor = equalised.by_module["blocks.0.mlp.fc1"]["input"].divisor
    assert divisor is not None
    assert divisor.argmax() == 3
    assert equalised.errors["blocks.0.mlp.fc1"] < plain.errors["blocks.0.mlp.fc1"] / 2
    assert eps_error(model, equalised) < eps_error(model, plain)
    assert all(site.divisor is None for site in equalised.sites if site.module.endswith("fc2"))  # nothing could divide


@pytest.mark.parametrize(
    ("softmax", "threshold", "expected"),
    [
        ("two-region", 17, "softmax"),
        ("two-region", 16, "softmax_numerator"),
        ("auto", 16, "softmax_numerator"),
        ("probability", 16, "softmax"),
        ("numerator", 17, "softmax_numerator"),
        ("uniform", 16, "symmetric"),
    ],
)
def test_numerators_are_taken_from_a_number_of_keys_on(
    monkeypatch: pytest.MonkeyPatch, softmax: str, threshold: int, expected: str
) -> None:
    """The tiny model has 16 tokens."""
    monkeypatch.setattr(layers, "NUMERATOR_KEYS", threshold)
    plans = {each.name: each for each in layers.plan(tiny_model(), QuantizationConfig(softmax=softmax, groups=3))}
    probabilities = plans["blocks.1.attn.value_product"].operands["left"]
    assert (probabilities.scheme, probabilities.scales) == (expected, 3)
    assert plans["blocks.1.attn.scores"].operands["left"].scheme == "symmetric"


@pytest.mark.slow
def test_numerators_are_calibrated_and_leave_less_error_than_probabilities(tmp_path: Path) -> None:
    """Of value products at 4 bits, each in the search's own metric."""
    model, errors = tiny_model(), {}
    for softmax in ("probability", "numerator"):
        config = replace(PRESETS["tq-dit"], softmax=softmax, activation_bits=4, **SMALL)
        table = calibrate(model, config, tmp_path).table
        quantizer = table.by_module["blocks.0.attn.value_product"]["left"].quantizer
        assert quantizer.scheme == {"probability": "softmax", "numerator": "softmax_numerator"}[softmax]
        assert quantizer.granularity == PerTimestepGroup(3)
        errors[softmax] = [error for name, error in table.errors.items() if name.endswith("value_product")]
    assert sum(errors["numerator"]) < sum(errors["probability"])


@pytest.mark.slow
def test_two_regions_are_taken_only_where_they_pay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def schemes(threshold: float) -> set[str]:
        monkeypatch.setattr(flow, "TWO_REGIONS_PAY", threshold)
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        table = calibrate(tiny_model(), replace(PRESETS["fast"], **SMALL), tmp_path / "work").table
        by_module = table.by_module
        probabilities = [by_module[f"blocks.{i}.attn.value_product"]["left"].quantizer for i in (0, 1)]
        assert all((q.scheme == "symmetric") == (q.granularity == PerTensor()) for q in probabilities)
        after_gelu = {by_module[f"blocks.{i}.mlp.fc2"]["input"].quantizer.scheme for i in (0, 1)}
        return after_gelu | {quantizer.scheme for quantizer in probabilities}

    assert schemes(1e9) == {"gelu", "softmax"}
    assert schemes(0.0) == {"asymmetric", "symmetric"}


@pytest.mark.slow
def test_the_demo_models_chain_at_8_bits_stays_at_the_float_one(tmp_path: Path) -> None:
    model = load_model("demo")
    errors = []
    for bits in (8, 6):
        config = QuantizationConfig(
            weight_bits=bits, activation_bits=bits, steps=12, groups=2, rows_per_group=4, chains=2, candidates=10
        )
        quantized = apply(model, calibrate(model, config, tmp_path).table)
        chains = {"steps": 12, "chains": 4, "seed": 1}
        reference, found = final_samples(model, **chains), final_samples(quantized, **chains)
        errors.append(float(np.median(relative_errors(reference, found))))
    assert errors[0] < 0.005
    assert errors[0] < errors[1] / 2  # of four chains, whose codes flip differently from processor to processor


def sites(model: LoadedModel, tmp_path: Path, **knobs: object) -> dict[str, int]:
    """name of each quantized tensor -> its bits"""
    config = replace(PRESETS["min-max"], **SMALL, **knobs)
    return {site.name: site.quantizer.bits for site in calibrate(model, config, tmp_path).table.sites}


@pytest.mark.slow
def test_the_default_quantizes_what_the_design_says(tmp_path: Path) -> None:
    found = sites(tiny_model(), tmp_path, weight_bits=4, activation_bits=6)
    linear = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    block = {f"blocks.{i}.{name}.{role}": bits for i in (0, 1) for name in linear
             for role, bits in (("weight", 4), ("input", 6))}  # fmt: skip
    attention = {f"blocks.{i}.attn.{name}.{role}": 6 for i in (0, 1) for name in ("scores", "value_product")
                 for role in ("left", "right")}  # fmt: skip
    conditioning = ["t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.adaLN_modulation.1",
                    *(f"blocks.{i}.adaLN_modulation.1" for i in (0, 1))]  # fmt: skip
    outer = {"x_embedder.proj.weight": 8, "final_layer.linear.weight": 8, "final_layer.linear.input": 8}
    assert found == block | attention | outer | {f"{name}.weight": 8 for name in conditioning}


@pytest.mark.slow
def test_switches_leave_parts_float(tmp_path: Path) -> None:
    found = sites(tiny_model(), tmp_path, attention=False, patch="all", final="none", conditioning="none")
    assert not any("scores" in name or "adaLN" in name or "final" in name for name in found)
    assert found["x_embedder.proj.input"] == 8
    everything = sites(tiny_model(), tmp_path, conditioning="all", outer_bits=2, weight_bits=3, activation_bits=5)
    assert everything["t_embedder.mlp.0.input"] == 5
    assert everything["final_layer.linear.weight"] == 3


@pytest.mark.slow
def test_attention_keeps_bits_of_its_own(tmp_path: Path) -> None:
    found = sites(tiny_model(), tmp_path, activation_bits=4, attention_bits=6,
                  overrides="blocks.1.attn.scores:attention_bits=2")  # fmt: skip
    assert found["blocks.0.attn.scores.left"] == found["blocks.0.attn.value_product.left"] == 6
    assert found["blocks.0.attn.value_product.right"] == 6
    assert found["blocks.1.attn.scores.right"] == found["blocks.0.mlp.fc1.input"] == 4
    assert sites(tiny_model(), tmp_path / "more", attention_bits=6)["blocks.0.attn.scores.left"] == 8


class KilledError(Exception):
    """Stands for a kill at one write."""


@pytest.mark.slow
def test_a_run_killed_before_any_of_its_writes_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the preset that writes files of every kind."""
    monkeypatch.setattr(capture, "MOST_ROWS", 5)  # three batches
    model, config = tiny_model(), replace(PRESETS["static"], **SMALL)
    undisturbed = calibrate(model, config, tmp_path / "a").table.to_bytes()
    files = {path.name for path in (tmp_path / "a").glob("search-*/*")}
    kinds = ["divisors", "samples-0000000", "samples-0000010", "table-x_embedder.proj"]
    assert files.issuperset(f"{kind}.safetensors" for kind in kinds)
    written: list[str] = []

    def limited(save: Callable[..., None]) -> Callable[..., None]:
        def write(folder: WorkFolder, name: str, content: object) -> None:
            if killed:
                raise KilledError
            save(folder, name, content)
            written.append(name)
            killed.append(name)

        return write

    killed: list[str] = []  # the one write that each attempt is allowed
    for method in ("save", "save_table"):
        monkeypatch.setattr(WorkFolder, method, limited(getattr(WorkFolder, method)))
    while True:
        killed.clear()
        try:
            table = calibrate(model, config, tmp_path / "b").table
            break
        except KilledError:
            assert len(written) < 100
    assert table.to_bytes() == undisturbed
    assert written.count("samples-0000005") == 1  # nothing was recorded or searched twice
    assert sum(name.startswith("table-") for name in written) == len(model.products)


@pytest.mark.slow
def test_resuming_costs_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MOST_ROWS", 5)
    model, config = tiny_model(), replace(PRESETS["tq-dit"], **SMALL)
    whole = calibrate(model, config, tmp_path).meter
    (second,) = tmp_path.glob("search-*/samples-0000005*")
    for path in (second, *tmp_path.glob("search-*/table-blocks.1.mlp.fc2*")):
        path.unlink()
    rest = calibrate(model, config, tmp_path).meter
    assert rest.forward_equivalents["inputs"] == 5
    assert whole.forward_equivalents["inputs"] == 12
    assert 0 < rest.spent["search"] < whole.spent["search"] / 3
    assert "rows" not in rest.spent


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 7])
def test_chains_that_were_stopped_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Every step is saved where there are fewer steps than saves."""
    model, config = tiny_model(), replace(PRESETS["min-max"], **SMALL)
    undisturbed = calibrate(model, config, tmp_path / "a").table.to_bytes()
    call, steps = Trajectory.call, []

    def stopped(trajectory: Trajectory, inputs: dict[str, np.ndarray]) -> np.ndarray:
        steps.append(trajectory.next_step)
        if steps[-1] == step and len(steps) == 12 - step:
            raise KilledError
        return call(trajectory, inputs)

    monkeypatch.setattr(Trajectory, "call", stopped)
    with pytest.raises(KilledError):
        calibrate(model, config, tmp_path / "b")
    resumed = calibrate(model, config, tmp_path / "b")
    assert steps == [*reversed(range(step, 12)), *reversed(range(step + 1))]
    assert resumed.table.to_bytes() == undisturbed
    assert resumed.meter.forward_equivalents["rows"] == 4 * (step + 1)


@pytest.mark.slow
def test_rows_are_kept_for_other_searches_and_the_rest_is_removed(tmp_path: Path) -> None:
    model, config = tiny_model(), replace(PRESETS["tq-dit"], **SMALL)
    (tmp_path / "search-of-my-life").mkdir()  # the user's: nothing of ours has such a name
    first = calibrate(model, config, tmp_path)
    first.folder.delete()
    assert sorted(path.name[:8] for path in tmp_path.iterdir())[-1] == "search-o"
    (tmp_path / "search-of-my-life").rmdir()
    assert [path.name[:5] for path in tmp_path.iterdir()] == ["rows-"]
    assert first.meter.spent["rows"] > 0
    second = calibrate(model, replace(config, weight_bits=5), tmp_path)
    assert "rows" not in second.meter.spent
    assert calibrate(model, config, tmp_path).table == first.table
    assert len(list(tmp_path.glob("search-*"))) == 1  # those of other settings are removed


@pytest.mark.slow
def test_a_damaged_file_of_rows_is_sampled_again(tmp_path: Path) -> None:
    model, config = tiny_model(), replace(PRESETS["tq-dit"], **SMALL)
    result = calibrate(model, config, tmp_path)
    first = result.table
    result.folder.delete()
    (rows,) = tmp_path.glob("rows-*")
    rows.write_bytes(rows.read_bytes()[:100])
    assert calibrate(model, config, tmp_path).table == first


@pytest.mark.slow
def test_another_seed_gives_another_table(tmp_path: Path) -> None:
    model, config = tiny_model(), replace(PRESETS["tq-dit"], **SMALL)
    assert calibrate(model, config, tmp_path).table != calibrate(model, replace(config, seed=1), tmp_path).table


@pytest.mark.slow
def test_another_family_calibrates(two_streams: LoadedModel, tmp_path: Path) -> None:
    config = replace(PRESETS["static"], **SMALL | {"rows_per_group": 3})
    table = calibrate(two_streams, config, tmp_path).table
    assert set(table.by_module) == {product.name for product in two_streams.products}
    assert "blocks.1.word_out" not in table.by_module  # the last block's words reach no prediction
    assert table.by_module["blocks.0.sdpa.value_product"]["left"].quantizer.scheme == "softmax"
    assert table.by_module["blocks.0.down"]["input"].quantizer.granularity == PerTimestepGroup(3)
    assert np.diff(table.boundaries) == pytest.approx(1 / 3)  # of timesteps 0..1
    assert table.settings["sampler"] == "euler"
    places = {product.name: product.folds[0].module for product in two_streams.products if product.folds}
    assert places == {f"blocks.{n}.down": f"blocks.{n}.up" for n in (0, 1)}  # v has two makers
    assert {site.module for site in table.sites if site.divisor is not None} <= set(places)
    rows = CalibrationRows.of(WorkFolder(tmp_path).load(next(tmp_path.glob("rows-*")).stem))
    assert len(rows) == 9
    assert eps_error_of(two_streams, table, rows) < 0.02


@pytest.mark.slow
def test_an_unguided_model_has_no_guidance_scale(tmp_path: Path) -> None:
    model = replace(tiny_model(), guidance=None)
    config = replace(PRESETS["min-max"], **SMALL | {"rows_per_group": 3})
    assert calibrate(model, config, tmp_path).table.guidance_scale == 1
    with pytest.raises(UsageError, match="without guidance"):
        calibrate(model, replace(config, guidance_scale=2.0), tmp_path)


def wide_diffusers_model() -> LoadedModel:
    """Two blocks of width 64 of diffusers' own module; weights 0.1 N(0, 1)."""
    network = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5,
    )  # fmt: skip
    model = diffusers.describe(randomize(network.eval(), scale=0.1), "wide")
    return replace(model, sampling=model.sampling.choose(20))


@pytest.mark.slow
def test_the_module_of_diffusers_loses_as_little_as_it_did_converted(tmp_path: Path) -> None:
    """Errors of the same weights converted to our DiT, as TQDiT did up to version 0.1: docs/calibration.md."""
    model = wide_diffusers_model()
    knobs = {"steps": 20, "groups": 4, "rows_per_group": 16, "chains": 4, "guidance_scale": 1.5}
    held_out = QuantizationConfig(**knobs, seed=10_000)
    trajectory = Trajectory(model, held_out, pick(model, held_out))
    trajectory.run()
    for preset, converted in (("tq-dit", 2.15e-4), ("min-max", 2.46e-4)):
        table = calibrate(model, replace(PRESETS[preset], **knobs), tmp_path).table
        assert eps_error_of(model, table, trajectory.rows()) < 1.3 * converted


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"weight_bits": 1}, "--weight-bits is 1; expected a whole number from 2 to 8"),
        ({"activation_bits": 9}, "--activation-bits is 9"),
        ({"alpha": 2.0}, "0 < alpha < beta"),
        ({"beta": float("inf")}, "beta <= 100"),
        ({"seed": 1.5}, r"--seed is 1\.5; expected a whole number"),
        ({"steps": 2.5}, r"--steps is 2\.5"),
        ({"guidance_scale": "4"}, "--guidance-scale is '4'"),
        ({"guidance_scale": 1e38}, r"1e\+38"),
        ({"metric": "cosine"}, "--metric is 'cosine'; known are ho, mse"),
    ],
)
def test_unusable_settings_are_refused(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QuantizationConfig(**knobs)  # type: ignore[arg-type]


@pytest.mark.slow
def test_more_rows_than_fit_into_memory_are_refused_before_the_chains_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tqdit.bounds.memory_left", lambda: 10**8)
    config = replace(PRESETS["tq-dit"], **SMALL | {"rows_per_group": 100_000})
    with pytest.raises(UsageError, match="300000 calibration rows from 2 chains"):
        calibrate(tiny_model(), config, tmp_path)


@pytest.mark.slow
def test_states_that_boundaries_are_placed_by_count_as_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps of all chains are held: 12 * 2 states of 256 float32 numbers."""
    config = replace(PRESETS["tq-dit"], **SMALL)
    held = (2 * 12 * 2 + 6 * 2) * 1024 + 2 * 12 * 16  # rows as states and ports; chains; timesteps and classes
    monkeypatch.setattr("tqdit.bounds.memory_left", lambda: held + 12 * 2 * 1024 - 1)
    flow.Calibration(tiny_model(), config.for_model(tiny_model()), tmp_path, Console(quiet=True))
    with pytest.raises(UsageError, match="12 calibration rows from 2 chains"):
        calibrate(tiny_model(), replace(config, boundaries="drift"), tmp_path)


# The command ------------------------------------------------------------------------------------------------------

FLAGS = ["--steps", "12", "--groups", "3", "--rows-per-group", "4", "--chains", "2", "--heads", "2"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tiny_model().network.state_dict().items()}, path)
    return path


@pytest.mark.slow
def test_the_command_writes_a_table_and_names_it_last(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "s.safetensors"
    assert main(["calibrate", str(checkpoint), "-o", str(output), "--no-attention", "--preset", "ho", *FLAGS]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == str(output)
    assert "forward-equivalents of one row (rows 48, " in shown.err
    assert "peak memory" in shown.err
    table = read_scale_table(output)
    assert table.settings["softmax"] == "uniform"
    assert not any("scores" in name for name in table.by_module)
    assert main(["calibrate", str(checkpoint), "-o", str(checkpoint), *FLAGS]) == 1
    assert "exists and is not a scale table" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance-scale", "nan"], "--guidance-scale is nan; expected a finite number"),
        (["--rows-per-group", "5"], "--rows-per-group is 5.*Pass an even number"),
        (["--groups", "13"], "group 6 of 13 has no timestep of a chain of 12 steps"),
        (["--groups", "13", "--boundaries", "drift"], "--groups is 13, more than the 12 steps"),
        (["--steps", "2000"], "--steps is 2000; expected a whole number from 1 to 1000"),
        (["--overrides", "blocks.9.mlp.fc1:activation_bits=4"], "'blocks.9.mlp.fc1', which is no layer of this model"),
    ],
)
def test_settings_are_refused_before_the_chains_run(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    flags: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(Trajectory, "call", lambda *_: pytest.fail("a chain ran"))
    output = tmp_path / "s.safetensors"
    assert main(["calibrate", str(checkpoint), "-o", str(output), *FLAGS, *flags]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.glob("s.safetensors*/*.safetensors"))


@pytest.mark.parametrize(
    ("flags", "preset"),
    [
        ([], "dynamic"),
        (["--activation-bits", "6"], "gptq"),
        (["--weight-bits", "4"], "gptq"),
        (["--weight-bits", "4", "--backend", "openvino"], "gptq"),
        (["--backend", "tensorrt"], "fast"),
        (["--weight-bits", "4", "--backend", "tensorrt-rtx"], "fast"),
        (["--preset", "tq-dit", "--backend", "tensorrt"], "tq-dit"),
    ],
)
def test_without_a_preset_the_bits_and_the_backend_decide(
    capsys: pytest.CaptureFixture[str], flags: list[str], preset: str
) -> None:
    assert main(["calibrate", "--print", *flags]) == 0
    shown = capsys.readouterr().out
    bits = [flag for flag in flags if flag.endswith("-bits") or flag.isdecimal()]
    assert main(["calibrate", "--print", "--preset", preset, *bits]) == 0
    assert capsys.readouterr().out == shown


def test_a_preset_prints_itself_with_the_flags_applied(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--preset", "paper", "--groups", "25", "--print"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["groups"] == "25"
    assert lines["fisher"] == "loss"
    assert lines["weight-granularity"] == "tensor"
