"""Placed steps: found by calibration, kept in the table, proposed by card and engine, resumed after a kill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support import exported, tiny_model
from tqdit import safetensors_file
from tqdit.calibration import placing
from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.flow import calibrate
from tqdit.calibration.placing import check_placing
from tqdit.cli.inspect import inspect
from tqdit.engines.build.engine import build_engine
from tqdit.engines.run.sampler import Sampler
from tqdit.errors import FileFormatError, UsageError
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write
from tqdit.golden import relative_errors
from tqdit.models.loaded import LoadedModel
from tqdit.onnx_file import read_card
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.table import METADATA_KEY, PlacedSteps, ScaleTable, parse, read_scale_table, write_scale_table
from tqdit.sampling.chains import Chains, run
from tqdit.sampling.process import Recorded, Table
from tqdit.sampling.schedule import SamplingSpec

SMALL = {"steps": 8, "groups": 2, "rows_per_group": 4, "chains": 2, "method": "min-max", "calls": 4}
LONG = ("dpm++2m", 24)
SPACINGS = ("placed", "uniform", "karras", "log-snr")


@pytest.fixture(autouse=True)
def short_long_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "LONG", LONG)
    monkeypatch.setattr(placing, "MOST_PLACED", LONG[1] // placing.STRIDE)


@pytest.fixture
def model() -> LoadedModel:
    return tiny_model(pixels=True)


def found(model: LoadedModel, folder: Path, **knobs: Any) -> ScaleTable:
    return calibrate(model, QuantizationConfig(**{**SMALL, **knobs}), folder).table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ScaleTable:
    """Of SMALL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "LONG", LONG)
        patch.setattr(placing, "MOST_PLACED", LONG[1] // placing.STRIDE)
        return found(tiny_model(pixels=True), tmp_path_factory.mktemp("work"))


@pytest.mark.slow
def test_the_steps_with_the_least_error_on_the_quantized_network_are_kept(
    model: LoadedModel, table: ScaleTable, tmp_path: Path
) -> None:
    placed = table.placed
    assert placed is not None
    assert set(placed.errors) == {f"{solver} {spacing}" for solver in ("dpm++2m", "unipc") for spacing in SPACINGS}
    best = min(placed.errors, key=lambda name: placed.errors[name])
    assert placed.sampler == best.split()[0]
    assert len(placed.timesteps) == 4
    SamplingSpec(model.sampling.process, placed.sampler, 4, placed.timesteps)  # which refuses what is no chain
    write_scale_table(tmp_path / "t.safetensors", table)
    assert read_scale_table(tmp_path / "t.safetensors") == table
    facts = [line for _, line in inspect(str(tmp_path / "t.safetensors"))]
    assert any(f"4 of {placed.sampler} at [{placed.timesteps[0]:g}, " in str(line) for line in facts)
    assert sum("error of 16 images" in str(line) for line in facts) == 8


@pytest.mark.slow
def test_a_sampler_can_be_named(model: LoadedModel, tmp_path: Path) -> None:
    placed = found(model, tmp_path, solver="ddim").placed
    assert placed is not None
    assert placed.sampler == "ddim"
    assert set(placed.errors) == {f"ddim {spacing}" for spacing in SPACINGS}


FORECASTS = {"calls": 6, "forecast": True}


@pytest.fixture
def prefers_forecasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least error of the placed steps of dpm++2m with 6 of 9 calls in full."""
    check = placing.Placing._error

    def error(self: placing.Placing, name: str, *rest: Any) -> float:
        return check(self, name, *rest) * (1e-6 if name == "dpm++2m placed, 6 of 9" else 1)

    monkeypatch.setattr(placing.Placing, "_error", error)


@pytest.mark.slow
def test_chains_with_forecasts_are_tried_beside_those_of_full_calls(model: LoadedModel, tmp_path: Path) -> None:
    """Chains of 9 and 12 steps: placed ones, and the published spacing that is best for 6 calls."""
    placed = found(model, tmp_path, **FORECASTS).placed
    assert placed is not None
    full = {f"{solver} {spacing}" for solver in ("dpm++2m", "unipc") for spacing in SPACINGS}
    assert full < set(placed.errors)
    tried = sorted(set(placed.errors) - full)
    assert Counter(name.split(", ")[1] for name in tried) == {"6 of 9": 4, "6 of 12": 4}
    assert {name for name in tried if " placed, " in name} == {
        f"{solver} placed, 6 of {steps}" for solver in ("dpm++2m", "unipc") for steps in (9, 12)
    }
    for solver in ("dpm++2m", "unipc"):
        spacing = min(SPACINGS[1:], key=lambda name: placed.errors[f"{solver} {name}"])
        assert {f"{solver} {spacing}, 6 of 9", f"{solver} {spacing}, 6 of 12"} < set(tried)
    best = min(placed.errors, key=lambda name: placed.errors[name])
    assert len(placed.timesteps) == (int(best.rpartition(" ")[2]) if ", " in best else 6)
    assert len(placed.full_calls) == (6 if ", " in best else 0)


@pytest.mark.slow
@pytest.mark.usefixtures("prefers_forecasts")
def test_a_chain_with_forecasts_goes_to_the_engine_and_its_images(model: LoadedModel, tmp_path: Path) -> None:
    """Without a word: the graph returns the residual because the table's chain has forecasts."""
    table = found(model, tmp_path / "work", **FORECASTS)
    placed = table.placed
    assert placed is not None
    assert (len(placed.timesteps), len(placed.full_calls)) == (9, 6)
    assert {0, 7, 8} < set(placed.full_calls)
    write_scale_table(tmp_path / "t.safetensors", table)
    assert read_scale_table(tmp_path / "t.safetensors") == table
    steps = ", ".join(map(str, placed.full_calls))
    assert ("full calls", f"at steps {steps}") in inspect(str(tmp_path / "t.safetensors"))
    write(tmp_path / "model.onnx", *exported(pixels=True, table=table))
    card = read_card(tmp_path / "model.onnx")
    assert card.residual is not None
    assert card.sampling.full_calls == placed.full_calls
    build_engine(tmp_path / "model.onnx", tmp_path / "model.engine")
    with Sampler.open(tmp_path / "model.engine") as sampler:
        own, full = sampler.sample_latents([1, 2], seed=3), sampler.sample_latents([1, 2], seed=3, full_calls=9)
    chains = Chains(model.signature, model.guidance, 2)
    for image, label in enumerate([1, 2]):
        chains.add(card.sampling.schedule, {"class_labels": label}, table.guidance_scale, 3, image)
    expected = run(chains, apply(model, table))  # apart from it for codes that flip at ties
    assert relative_errors(own, expected).max() < relative_errors(own, full).min() / 10
    assert ExportConfig(steps=8).returns_residual(model, table) is False
    assert ExportConfig("step").returns_residual(model, table) is False


def test_forecasts_of_a_network_without_blocks_are_refused_before_any_work(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tqdit.models.blocks.block_names", lambda _: [])
    with pytest.raises(UsageError, match="forecast"):
        found(model, tmp_path / "work", **FORECASTS)
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_a_stopped_search_of_full_calls_goes_on_to_the_same_table(model: LoadedModel, tmp_path: Path) -> None:
    expected, calls, network = found(model, tmp_path / "whole", **FORECASTS), 0, LoadedModel.full

    def fail(self: LoadedModel, inputs: Mapping[str, Any]) -> Any:
        nonlocal calls
        calls += 1
        if calls == 18:  # of the long chain
            raise KeyboardInterrupt
        return network(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "full", fail)
        with pytest.raises(KeyboardInterrupt):
            found(model, tmp_path / "stopped", **FORECASTS)
    assert found(model, tmp_path / "stopped", **FORECASTS) == expected


@pytest.mark.slow
def test_without_calls_no_step_is_placed(model: LoadedModel, tmp_path: Path) -> None:
    assert found(model, tmp_path, calls=None).placed is None


@pytest.mark.slow
def test_a_flow_without_guidance_is_placed(two_streams: LoadedModel, tmp_path: Path) -> None:
    placed = found(two_streams, tmp_path, solver="euler").placed
    assert placed is not None
    assert placed.timesteps[-1] == two_streams.sampling.process.span[1]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [20, 40])  # in the long chain, and in a short one
def test_a_stopped_search_goes_on_to_the_same_table(
    model: LoadedModel, table: ScaleTable, tmp_path: Path, failing: int
) -> None:
    calls, network = 0, LoadedModel.__call__

    def fail(self: LoadedModel, inputs: Mapping[str, Any]) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise KeyboardInterrupt
        return network(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "__call__", fail)
        with pytest.raises(KeyboardInterrupt):
            found(model, tmp_path / "stopped")
    assert found(model, tmp_path / "stopped") == table


@pytest.mark.slow
def test_the_file_proposes_the_placed_chain_and_the_published_one_stays(
    model: LoadedModel, table: ScaleTable, tmp_path: Path
) -> None:
    assert table.placed is not None
    placed = SamplingSpec(model.sampling.process, table.placed.sampler, 4, table.placed.timesteps)
    write(tmp_path / "model.onnx", *exported(pixels=True, table=table))
    card = read_card(tmp_path / "model.onnx")
    assert card.sampling == placed
    assert card.as_published == model.sampling == SamplingSpec(model.sampling.process, "ddpm", 20)
    assert card.remark(card.sampling) is None  # the steps were found with these scales
    assert card.remark(card.sampling.choose(8, "ddpm")) is None  # the chain of the rows
    assert "sampling 4 steps of ddim" in (card.remark(card.sampling.choose(sampler="ddim")) or "")
    assert "20 steps of ddpm" in (card.remark(card.as_published) or "")
    told = [str(line) for _, line in inspect(str(tmp_path / "model.onnx"))]
    assert any(line.startswith(f"4 placed steps of {placed.sampler}") for line in told)
    assert "20 steps of ddpm" in told


@pytest.mark.slow
def test_an_export_may_propose_another_chain(model: LoadedModel, tmp_path: Path) -> None:
    table = found(model, tmp_path / "work", solver="dpm++2m")
    assert ExportConfig(steps=6).sampling(model, table) == model.sampling.choose(6, "dpm++2m")
    assert ExportConfig(sampler="ddim").sampling(model, table) == model.sampling.choose(4, "ddim")
    step = ExportConfig("step").sampling(model, table)  # a step graph cannot look back at earlier steps
    assert step == model.sampling.choose(8, "ddpm")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"solver": "ddpm"}, "ddpm draws noise"),
        ({"solver": "heun"}, "'heun'.*cannot be placed"),
        ({"solver": "euler"}, "'euler'.*not one for this model"),
        ({"calls": 1}, "--calls is 1"),
        ({"calls": 51}, "--calls is 51"),
        ({"calls": 2, "forecast": True}, "at least 3 calls; found --calls 2"),
        ({"calls": 9, "forecast": True}, "at most 12 steps.*--calls 9. Pass at most 8"),  # of the short long chain here
        ({"calls": None, "forecast": True}, "--forecast.*--calls N.*both"),
    ],
)
def test_steps_that_cannot_be_placed_are_refused_at_once(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knobs: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(LoadedModel, "__call__", None)
    with pytest.raises(UsageError, match=message):
        found(model, tmp_path, **knobs)


def test_a_chain_of_which_nothing_is_known_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    table = Table((1.0, 3.0), (1.0, 1.0), ((1.0,), (1.0,)), ((-1.0,), (-1.0,)), (0.0, 0.0), 1.0)
    unknown = replace(model, sampling=SamplingSpec(Recorded("SomeScheduler", (table,)), "recorded", 2))
    with pytest.raises(UsageError, match=r"--calls.*not known"):
        check_placing(unknown.sampling, unknown.signature, QuantizationConfig(calls=4))


@pytest.mark.slow
def test_places_that_no_chain_has_are_refused_by_the_export(model: LoadedModel, tmp_path: Path) -> None:
    table = replace(found(model, tmp_path / "work", calls=None), placed=PlacedSteps("unipc", (5.0, 3.0), {}, 1))
    with pytest.raises(FileFormatError, match=r"placed steps.*5, 3"):
        ExportConfig().sampling(model, table)


@pytest.mark.slow
def test_a_damaged_error_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    table = replace(found(model, tmp_path / "work", calls=None), placed=PlacedSteps("ddim", (3.0,), {"x": 1.5}, 1))
    write_scale_table(tmp_path / "t.safetensors", table)
    metadata, tensors = safetensors_file.read(tmp_path / "t.safetensors")
    text = metadata[METADATA_KEY].replace('"x":1.5', '"x":-1.5')
    with pytest.raises(FileFormatError, match=r"-1.5"):
        parse({METADATA_KEY: text}, tensors)
