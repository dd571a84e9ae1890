"""The builder around the backends: float types and the audit."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

import support
from tables import Kind, make_table, random_rows
from tqdit.card import METADATA_KEY, GraphCard, QuantizationCard
from tqdit.engines.build.audit import audit, check_audit
from tqdit.engines.build.backend import builder, choose_backend
from tqdit.engines.build.engine import build_engine
from tqdit.engines.bundle import read_manifest
from tqdit.engines.config import BatchRange, BuildConfig
from tqdit.engines.run.backend import open_engine
from tqdit.engines.run.sampler import Sampler
from tqdit.errors import BackendError, FileFormatError, UsageError
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write
from tqdit.graph_names import SCOPE_KEY, Scopes
from tqdit.quantization.fake_quant import apply
from tqdit.sampling.correction import Correction
from tqdit.sampling.schedule import SamplingSpec


@pytest.mark.slow
@pytest.mark.parametrize(("choice", "expected"), [("auto", "fp16"), ("fp16", "fp16"), ("fp32", "fp32")])
def test_the_builder_casts_the_file_to_the_type_that_the_backend_likes(
    quantized, tmp_path, plain_backend, choice, expected
):
    build_engine(quantized, tmp_path / "model.engine", "plain", BuildConfig(float_type=choice))
    assert read_manifest(tmp_path / "model.engine").float_type == expected
    compiled = onnx.load(tmp_path / "model.engine" / "graph.onnx", load_external_data=False).graph
    halves = [tensor for tensor in compiled.initializer if tensor.data_type == onnx.TensorProto.FLOAT16]
    assert bool(halves) == (expected == "fp16")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.engine", "model.onnx"]


@pytest.mark.slow
def test_a_type_that_the_backend_only_emulates_is_refused(quantized, tmp_path):
    with pytest.raises(UsageError, match="--float-type fp16: onnxruntime would only emulate it here; it has fp32"):
        build_engine(quantized, tmp_path / "model.engine", config=BuildConfig(float_type="fp16"))
    assert not (tmp_path / "model.engine").exists()


@pytest.mark.slow
def test_a_build_proves_its_products_integer(quantized, tmp_path):
    manifest = build_engine(quantized, tmp_path / "model.engine")
    assert manifest.audit is not None
    promised = [form for form in manifest.card.quantization.products.values() if form == "integer"]
    assert manifest.audit.integer == len(promised) == 14
    assert manifest.audit.line.endswith("0 fallen back")


@pytest.mark.slow
def test_an_engine_rounds_what_fused_attention_hands_on(tmp_path):
    """ONNX Runtime gets a quantizer in the place of the op's int8 result; the fake-quantized model agrees."""
    model = support.tiny_model()
    table = make_table(model, Kind(groups=10))
    write(tmp_path / "m.onnx", *support.exported(ExportConfig(attention="fused"), table=table))
    manifest = build_engine(tmp_path / "m.onnx", tmp_path / "m.engine")
    inputs = random_rows(model.signature, 32)
    engine = open_engine(tmp_path / "m.engine", manifest, manifest.entry)
    support.assert_agrees(engine(inputs), apply(model, table)(inputs))


@pytest.mark.slow
def test_products_with_numerators_are_integer(tmp_path):
    """Both products of attention; fused and simulated attention simulate them."""
    table = make_table(support.tiny_model(), Kind(groups=10, numerators=True))
    for form, integer in (("integer", 14), ("simulated", 10), ("fused", 10)):
        path = tmp_path / f"{form}.onnx"
        write(path, *support.exported(ExportConfig(attention=form), table=table))
        manifest = build_engine(path, tmp_path / f"{form}.engine")
        found = manifest.audit
        assert (found.integer, found.simulated, found.fallen_back) == (integer, 14 - integer, ())


@pytest.mark.slow
def test_a_product_that_lost_its_quantized_input_fails_the_audit_by_name(quantized, tmp_path):
    model = onnx.load(quantized)
    target = "blocks.1.mlp.fc1"
    nodes = {node.name: node for node in model.graph.node}
    nodes[f"{target}/MatMul"].input[0] = nodes[f"{target}/QuantizeLinear"].input[0]
    onnx.save(model, quantized)
    with pytest.raises(BackendError, match=rf"would run in float on onnxruntime: {target}\. Likely cause"):
        build_engine(quantized, tmp_path / "model.engine")
    assert not (tmp_path / "model.engine").exists()
    kept = build_engine(quantized, tmp_path / "model.engine", config=BuildConfig(allow_fallback=True))
    assert kept.audit.fallen_back == (target,)


def test_the_audit_counts_a_product_with_a_float_twin_as_fallen_back():
    card = QuantizationCard(
        8,
        8,
        (),
        "simulated",
        {"a": "integer", "b": "integer", "c": "simulated", "d": "weight-only"},
        SamplingSpec(),
    )
    nodes = [SimpleNamespace(name=f"node of {name}", output=[], metadata_props={SCOPE_KEY: name}) for name in "abcd"]
    scopes = Scopes(nodes)
    report = audit(card, scopes, ["node of a", "node of b"], ["node of b/fused", "node of c", "not in the file"])
    assert (report.integer, report.simulated, report.weight_only, report.fallen_back) == (1, 1, 1, ("b",))
    with pytest.raises(BackendError, match=r"1 quantized product\(s\) would run in float on x: b"):
        check_audit(report, "x", "a cause")


@pytest.mark.parametrize("text", ["", "a", "1,2", "0,1,2", "2,1,3", "1,3,2", "1,2,3,4"])
def test_a_batch_range_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="--batch"):
        BatchRange.parse(text)


def test_batch_ranges_are_read():
    assert BatchRange.parse("1,4,16") == BatchRange(1, 4, 16)
    assert BatchRange.parse("4") == BatchRange(4, 4, 4)


@pytest.mark.slow
def test_an_option_that_the_backend_does_not_know_is_refused(quantized, tmp_path):
    with pytest.raises(UsageError, match="--target has no meaning for onnxruntime"):
        build_engine(quantized, tmp_path / "model.engine", config=BuildConfig(targets=("8.9",)))


def test_auto_takes_a_backend_that_runs_here_and_says_why():
    name, why = choose_backend()
    assert builder(name).fitness().score > 0
    assert why.startswith(builder(name).fitness().reason)


@pytest.mark.slow
def test_a_float_precision_strips_a_quantized_file(quantized, tmp_path):
    integer = build_engine(quantized, tmp_path / "int8.engine")
    floating = build_engine(quantized, tmp_path / "fp32.engine", config=BuildConfig(precision="fp32"))
    assert (integer.precision, floating.precision) == ("int8", "fp32")
    assert floating.audit is None
    assert floating.card.quantization is None
    with Sampler.open(tmp_path / "int8.engine") as a, Sampler.open(tmp_path / "fp32.engine") as b:
        found, expected = a.sample_latents([0, 1], seed=3), b.sample_latents([0, 1], seed=3)
    assert 0 < np.square(found - expected).sum() < 0.05 * np.square(expected).sum()  # random weights quantize badly
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fp32.engine", "int8.engine", "model.onnx"]


@pytest.mark.slow
def test_a_float_precision_is_the_float_type_too(quantized, tmp_path, plain_backend):
    manifest = build_engine(quantized, tmp_path / "model.engine", "plain", BuildConfig(precision="fp16"))
    assert read_manifest(tmp_path / "model.engine").float_type == "fp16"
    assert manifest.card.quantization is None
    compiled = onnx.load(tmp_path / "model.engine" / "graph.onnx", load_external_data=False).graph
    kinds = {tensor.data_type for tensor in compiled.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert onnx.TensorProto.INT8 not in kinds
    with pytest.raises(UsageError, match="--precision fp16 and --float-type fp32 contradict"):
        build_engine(quantized, tmp_path / "b", "plain", BuildConfig(precision="fp16", float_type="fp32"))


def test_the_float_type_of_a_float_file_is_its_precision(tmp_path, plain_backend):
    write(tmp_path / "float.onnx", *support.exported(pixels=True))
    manifest = build_engine(tmp_path / "float.onnx", tmp_path / "b", "plain", BuildConfig(float_type="fp16"))
    assert manifest.precision == manifest.float_type == "fp16"


def test_integers_of_a_float_file_are_refused(tmp_path):
    write(tmp_path / "float.onnx", *support.exported(pixels=True))
    with pytest.raises(UsageError, match=r"holds a float graph, asked for int8\. Export it with a scale table"):
        build_engine(tmp_path / "float.onnx", tmp_path / "b", config=BuildConfig(precision="int8"))


@pytest.mark.slow
def test_onnxruntime_keeps_integers_under_a_run_time_scale_and_the_audit_says_so(quantized, tmp_path):
    """Unlike OpenVINO and TensorRT-RTX, where such a file fails the audit (test_openvino.py, test_tensorrt_rtx.py): its
    integer product takes the scale of a tensor as an input."""
    model = onnx.load(quantized)
    nodes = {node.name: node for node in model.graph.node}
    quantize, dequantize = (nodes[f"blocks.1.mlp.fc1/{name}"] for name in ("QuantizeLinear", "DequantizeLinear_2"))
    assert dequantize.input[0] == quantize.output[0]
    model.graph.node.insert(0, onnx.helper.make_node("Mul", ["top", quantize.input[1]], ["run_time_step"]))
    model.graph.node.insert(0, onnx.helper.make_node("ReduceMax", ["rows"], ["top"], keepdims=0))
    model.graph.node.insert(0, onnx.helper.make_node("Cast", ["timestep"], ["rows"], to=onnx.TensorProto.FLOAT))
    quantize.input[1] = dequantize.input[1] = "run_time_step"
    onnx.save(model, quantized)
    assert build_engine(quantized, tmp_path / "model.engine").audit.integer == 14


@pytest.mark.slow
def test_a_run_time_scale_per_row_loses_integers_in_onnxruntime_and_fails_the_audit(quantized, tmp_path):
    """What time-grouped scales would be without the factoring of our export: one step for each row of the batch."""
    model = onnx.load(quantized)
    nodes = {node.name: node for node in model.graph.node}
    pair = [nodes[f"blocks.1.mlp.fc1/{name}"] for name in ("QuantizeLinear", "DequantizeLinear_2")]
    node = onnx.helper.make_node
    added = [
        node("Cast", ["timestep"], ["rows"], to=onnx.TensorProto.FLOAT),
        node("Mul", ["rows", pair[0].input[1]], ["steps"]),
        node("Sub", ["rows", "rows"], ["none"]),
        node("Cast", ["none"], ["zeros"], to=onnx.TensorProto.INT8),
    ]
    for one in reversed(added):
        model.graph.node.insert(0, one)
    for one in pair:
        one.input[1:] = ["steps", "zeros"]
        del one.attribute[:]
        one.attribute.append(onnx.helper.make_attribute("axis", 0))
    onnx.save(model, quantized)
    with pytest.raises(BackendError, match=r"would run in float on onnxruntime: blocks\.1\.mlp\.fc1\. Likely cause"):
        build_engine(quantized, tmp_path / "model.engine")


def test_weights_beside_a_small_file_come_into_the_bundle(tmp_path):
    """As an editor of graphs may have put them. Left to itself, ONNX Runtime leaves them where no bundle has them."""
    write(tmp_path / "model.onnx", *support.exported(pixels=True))
    model = onnx.load(tmp_path / "model.onnx")
    (tmp_path / "edited").mkdir()
    beside = {"save_as_external_data": True, "location": "weights.data", "size_threshold": 200}
    onnx.save(model, tmp_path / "edited" / "model.onnx", **beside)
    images = []
    for folder in (tmp_path, tmp_path / "edited"):
        build_engine(folder / "model.onnx", folder / "model.engine")
        with Sampler.open(folder / "model.engine") as sampler:
            images.append(sampler.sample([1]))
    assert (tmp_path / "edited" / "weights.data").is_file()
    np.testing.assert_array_equal(*images)


@pytest.mark.slow
def test_a_stripped_file_takes_the_weights_along_that_lay_beside_it(quantized, tmp_path):
    beside = {"save_as_external_data": True, "location": "weights.data", "size_threshold": 200}
    (tmp_path / "edited").mkdir()
    onnx.save(onnx.load(quantized), tmp_path / "edited" / "model.onnx", **beside)
    latents = []
    for source in (quantized, tmp_path / "edited" / "model.onnx"):
        build_engine(source, source.with_suffix(".engine"), config=BuildConfig(precision="fp32"))
        with Sampler.open(source.with_suffix(".engine")) as sampler:
            latents.append(sampler.sample_latents([1]))
    np.testing.assert_array_equal(*latents)


@pytest.mark.slow
def test_a_file_whose_nodes_lost_their_metadata_is_refused(quantized, tmp_path):
    model = onnx.load(quantized)
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.save(model, quantized)
    with pytest.raises(FileFormatError, match=r"model\.onnx: no node says to which module.*tqdit\.scope.*Export again"):
        build_engine(quantized, tmp_path / "model.engine")


@pytest.mark.slow
def test_a_correction_is_of_the_errors_of_integers_alone(quantized, tmp_path):
    model = onnx.load(quantized)
    entry = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    card = GraphCard.from_json(entry.value, "test")
    channels = card.state_shape[0]
    correction = Correction((0.0, 999.0), 1.5, (0.1, 0.1), ((0.0,) * channels,) * 2, (0.0, 0.0))
    entry.value = json.dumps(replace(card, correction=correction).to_json())
    onnx.save(model, tmp_path / "corrected.onnx")
    for precision, kept in ((None, correction), ("fp32", None)):
        config = BuildConfig(precision=precision)
        manifest = build_engine(tmp_path / "corrected.onnx", tmp_path / f"{precision}.engine", config=config)
        assert manifest.card.correction == kept
