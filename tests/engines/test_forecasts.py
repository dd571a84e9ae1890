"""Forecasts on engines: a full call also gives the residual, which a forecast takes in place of the blocks."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

import support
from tables import Kind, make_table
from tqdit.engines.build.engine import build_engine
from tqdit.engines.build.fastest import build_fastest
from tqdit.engines.bundle import FORECAST, Manifest, check_overwrite, check_parts, read_manifest
from tqdit.engines.run.backend import open_engine
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.step_batcher import StepBatcher
from tqdit.errors import FileFormatError, OutputError, UsageError, VerificationError
from tqdit.exporter.graph import ExportConfig, export_graph
from tqdit.exporter.onnx_writer import write
from tqdit.quantization.fake_quant import apply
from tqdit.sampling.chains import Chains, run
from tqdit.sampling.forecasts import RESIDUAL

LABELS = [0, 3, 1]
CHAIN = {"steps": 14, "sampler": "dpm++2m"}


@pytest.fixture(scope="module")
def model():
    return support.tiny_model(pixels=True)


@pytest.fixture(scope="module")
def table(model):
    return make_table(model, Kind(groups=3))


@pytest.fixture(scope="module")
def file(model, table, tmp_path_factory):
    path = tmp_path_factory.mktemp("forecast") / "model.onnx"
    write(path, *export_graph(model, ExportConfig(forecast=True), table))
    return path


@pytest.fixture(scope="module")
def bundle(file):
    build_engine(file, file.with_suffix(".engine"))
    return file.with_suffix(".engine")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_chain_on_an_engine_ends_as_that_of_the_network(model, table, file, bundle, backend):
    """Of the fake-quantized network; the tolerance is for codes that flip at ties."""
    folder = bundle if backend == "onnxruntime" else file.with_suffix(".openvino")
    if backend == "openvino":
        assert build_engine(file, folder, backend).audit.fallen_back == ()
    quantized = apply(model, table)
    for calls in (14, 6):
        spec = model.sampling.choose(**CHAIN, full_calls=calls)
        chains = Chains(model.signature, model.guidance, len(LABELS))
        for image, label in enumerate(LABELS):
            chains.add(spec.schedule, {model.signature.label.name: label}, 2.0, 5, image)
        expected = run(chains, quantized)
        with Sampler.open(folder) as sampler:
            found = sampler.sample_latents(LABELS, 2.0, seed=5, **CHAIN, full_calls=calls)
        error = np.square(found - expected).sum() / np.square(expected).sum()
        assert error < 1e-3


def test_the_forecast_has_no_block_and_the_full_call_has_all(file, bundle):
    """The blocks' products are in one of the two graphs alone."""
    full, forecast = (onnx.load(folder / "graph.onnx").graph for folder in (bundle, bundle / FORECAST))
    assert [value.name for value in full.output] == ["prediction", RESIDUAL]
    assert RESIDUAL in {value.name for value in forecast.input}
    products = {"MatMulIntegerToFloat", "QLinearMatMul", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
    of_blocks = [
        [node.name for node in graph.node if node.name.startswith("blocks.") and node.op_type in products]
        for graph in (full, forecast)
    ]
    assert len(of_blocks[0]) >= 12
    assert of_blocks[1] == []
    assert {"x_embedder", "final_layer"} <= {node.name.split(".")[0].split("/")[0] for node in forecast.node}


def test_a_forecast_with_the_true_residual_is_the_full_call(bundle):
    """Up to the rounding of a difference and a sum in float32."""
    manifest = read_manifest(bundle)
    inputs = manifest.card.signature.zeros(4)
    inputs["x"] = np.random.default_rng(0).standard_normal(inputs["x"].shape).astype(np.float32)
    full, forecast = (
        open_engine(bundle, manifest, name) for name in (manifest.entry, f"{FORECAST}/{manifest.forecast}")
    )
    prediction, residual = full.outputs(inputs)
    assert residual.shape == (4, *manifest.card.residual)
    np.testing.assert_array_equal(full(inputs), prediction)
    np.testing.assert_allclose(forecast({**inputs, RESIDUAL: residual}), prediction, rtol=0, atol=1e-4)
    assert np.abs(forecast({**inputs, RESIDUAL: 0 * residual}) - prediction).max() > 0.01


def test_requests_with_forecasts_and_without_share_a_batcher_and_end_as_alone(bundle):
    """Bit for bit. Those that forecast need as many full calls as they say."""
    asked = [{**CHAIN, "full_calls": 5}, CHAIN, {"steps": 9, "sampler": "ddpm", "full_calls": 4}, {"steps": 3}]
    with Sampler.open(bundle, batch=4) as sampler:
        alone = [sampler.sample([label % 5], seed=label, **chain)[0] for label, chain in enumerate(8 * asked)]
        with StepBatcher(sampler) as batcher:
            futures = [batcher.submit(label % 5, seed=label, **chain) for label, chain in enumerate(8 * asked)]
            for future, image in zip(futures, alone, strict=True):
                np.testing.assert_array_equal(future.result(60), image)
            assert batcher.stats().running == 0


def test_a_float_engine_has_forecasts_too(model, tmp_path):
    write(tmp_path / "m.onnx", *export_graph(model, ExportConfig(forecast=True)))
    manifest = build_engine(tmp_path / "m.onnx", tmp_path / "m.engine")
    assert manifest.forecast is not None
    with Sampler.open(tmp_path / "m.engine") as sampler:
        assert np.isfinite(sampler.sample_latents(LABELS, **CHAIN, full_calls=5)).all()


def test_an_engine_without_forecasts_says_how_to_get_them(tmp_path):
    write(tmp_path / "m.onnx", *support.exported(pixels=True))
    build_engine(tmp_path / "m.onnx", tmp_path / "m.engine")
    with Sampler.open(tmp_path / "m.engine") as sampler, pytest.raises(UsageError, match="exported with forecasts"):
        sampler.sample([1], **CHAIN, full_calls=5)


def test_a_step_graph_has_no_forecasts():
    with pytest.raises(UsageError, match="step graph"):
        ExportConfig("step", forecast=True)


def test_of_several_files_the_fastest_brings_its_forecast(file, tmp_path):
    manifest = build_fastest([file, file], tmp_path / "m.engine")
    check_parts(tmp_path / "m.engine", manifest)
    with Sampler.open(tmp_path / "m.engine") as sampler:
        assert np.isfinite(sampler.sample_latents(LABELS, **CHAIN, full_calls=5)).all()


def test_files_with_forecasts_and_without_are_not_forms_of_one(file, tmp_path):
    write(tmp_path / "m.onnx", *support.exported(pixels=True))
    with pytest.raises(UsageError, match=r"model\.onnx: returns what forecasts need.*--forecast"):
        build_fastest([tmp_path / "m.onnx", file], tmp_path / "m.engine")


def test_a_wrong_forecast_fails_the_build(file, tmp_path, monkeypatch):
    from tqdit.engines.build import forecast

    def cut(model, where, whole=forecast.cut_blocks):
        whole(model, where)
        for node in model.graph:
            if node.name == f"{RESIDUAL}/Add":
                node.replace_input_with(0, node.inputs[1])  # the residual twice

    monkeypatch.setattr(forecast, "cut_blocks", cut)
    with pytest.raises(VerificationError, match="forecast"):
        build_engine(file, tmp_path / "m.engine")
    assert not (tmp_path / "m.engine").exists()


def test_the_folder_of_a_forecast_is_part_of_the_bundle(file, bundle, tmp_path):
    """It is hashed, a missing part is named, and a file of somebody else's in it is not removed."""
    folder = tmp_path / "m.engine"
    build_engine(file, folder)
    build_engine(file, folder)  # over itself
    (folder / FORECAST / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        check_overwrite(folder)
    (folder / FORECAST / "notes.txt").unlink()
    (folder / FORECAST / "graph.onnx").unlink()
    with pytest.raises(FileFormatError, match=r"forecast.*missing"):
        Sampler.open(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("../graph.onnx", "other/graph.onnx"):
        changed = read_manifest(bundle).to_json() | {"forecast": name}
        (folder / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(FileFormatError, match="not a file of this bundle"):
            read_manifest(folder)
    assert manifest["forecast"] == "graph.onnx"


def test_a_manifest_whose_forecast_and_card_do_not_go_together_is_refused(bundle, tmp_path):
    whole, chain = read_manifest(bundle).to_json(), {**CHAIN, "full_calls": [0, 12, 13]}
    nothing = {"forecast": None, "card": {**whole["card"], "residual": None}}
    own = {"sampling": whole["card"]["sampling"] | chain, "residual": None}
    for changes in ({"forecast": None}, {"card": nothing["card"]}, {"forecast": None, "card": whole["card"] | own}):
        with pytest.raises(FileFormatError, match="do not go together"):
            Manifest.from_json(json.dumps(whole | changes), tmp_path)
    assert Manifest.from_json(json.dumps(whole | nothing), tmp_path).forecast is None
