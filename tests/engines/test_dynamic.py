"""Scales per token in engines: integer products everywhere, the fake-quantized network, rows that feel no others."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from torch import nn

import support
from networks import Tokens, described
from tables import Kind, make_table, random_rows
from tqdit.engines.backends.onnxruntime import build as onnxruntime_build
from tqdit.engines.build.cast import cast_floats
from tqdit.engines.build.engine import build_engine
from tqdit.engines.bundle import read_manifest
from tqdit.engines.config import BuildConfig
from tqdit.engines.run.backend import open_engine
from tqdit.errors import BackendError, TqditWarning
from tqdit.exporter.graph import ExportConfig, export_graph
from tqdit.exporter.onnx_writer import write
from tqdit.exporter.passes.quantize import exported_sites
from tqdit.lint import lint
from tqdit.onnx_file import OnnxFile
from tqdit.quantization.fake_quant import apply

pytestmark = pytest.mark.slow

CPU = ["onnxruntime", "openvino"]
FLOAT32 = BuildConfig(float_type="fp32")
EVERY_LINEAR = 10  # of the tiny model: four in each of two blocks, the patch embedding and the final one


class Chain(nn.Module):
    """Two layers, so that what the first one makes of a token is an input of the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.second(self.first(x))


def exported(folder, model, table, **config):
    write(folder / "model.onnx", *export_graph(model, ExportConfig(**config), table))
    return folder / "model.onnx"


def engine(path, backend, config=FLOAT32):
    bundle = path.with_suffix(f".{backend}")
    manifest = build_engine(path, bundle, backend, config)
    return open_engine(bundle, manifest, manifest.entry, 1), manifest


@pytest.mark.parametrize(("bits", "asymmetric", "attention", "backend"), support.few(
    [
        (*kind, attention, backend)
        for kind in ((8, True), (6, False)) for attention in ("float", "integer") for backend in CPU
    ],
    (8, True, "integer", "onnxruntime"), (8, True, "float", "openvino"), (6, False, "integer", "openvino"),
))  # fmt: skip
def test_an_engine_is_integer_and_computes_the_fake_quantized_network(tmp_path, backend, attention, bits, asymmetric):
    model = support.tiny_model()
    table = make_table(model, Kind(activation_bits=bits, dynamic=True, asymmetric=asymmetric))
    path = tmp_path / "model.onnx"
    write(path, *support.exported(ExportConfig(attention=attention), table=table))
    assert [finding for finding in lint(onnx.load(path)) if finding.severity == "error"] == []
    run, manifest = engine(path, backend)
    assert manifest.audit.fallen_back == ()
    assert manifest.audit.integer == EVERY_LINEAR + (4 if attention == "integer" else 0)
    inputs = random_rows(model.signature, 48, last=999)
    expected = apply(model, exported_sites(table, attention))(inputs)
    support.assert_agrees(run(inputs), expected, bits)


def test_tensorrt_rtx_multiplies_integers(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for x86-64 only")
    for asymmetric, float_type in ((False, "fp16"), (True, "bf16")):
        table = make_table(support.tiny_model(), Kind(dynamic=True, asymmetric=asymmetric))
        path = tmp_path / f"{float_type}.onnx"
        write(path, *support.exported(ExportConfig(attention="float"), table=table))
        with pytest.warns(TqditWarning, match="scales per token.*--backend tensorrt"):
            build_engine(path, tmp_path / float_type, "tensorrt-rtx", BuildConfig(float_type=float_type))
        report = read_manifest(tmp_path / float_type).audit
        assert (report.integer, report.fallen_back) == (EVERY_LINEAR, ())


@pytest.mark.parametrize("backend", CPU)
def test_a_row_has_the_same_bits_alone_and_beside_any_others(tmp_path, backend):
    model = support.tiny_model()
    path = tmp_path / "model.onnx"
    write(path, *support.exported(ExportConfig(attention="float"), table=make_table(model, Kind(dynamic=True))))
    run, _ = engine(path, backend)
    inputs = random_rows(model.signature, 6)
    wild = {name: array * 1000 if name == "x" else array for name, array in random_rows(model.signature, 6, 1).items()}
    alone = {name: array[2:3] for name, array in inputs.items()}
    beside = {name: np.concatenate([wild[name][:2], array[2:3], wild[name][3:]]) for name, array in inputs.items()}
    np.testing.assert_array_equal(run(alone)[0], run(inputs)[2])
    np.testing.assert_array_equal(run(beside)[2], run(inputs)[2])


@pytest.mark.parametrize("backend", CPU)
def test_tokens_that_are_not_ordinary_spoil_no_other(tmp_path, backend):
    """An infinite token gives one that is not finite, a token of zeros or denormals that of an exact 0.

    A maximum in OpenVINO passes over NaN, so a token of NaN counts as one of zeros there.
    """
    model = described(Tokens(Chain()), (4, 6))
    table = make_table(model, Kind(dynamic=True, conditioning_inputs=True))
    run, manifest = engine(exported(tmp_path, model, table), backend)
    assert manifest.audit.fallen_back == ()
    inputs = random_rows(model.signature, 2, last=1)
    inputs["x"][0, :, 4] = 0
    ordinary = run(inputs)
    spoilt = {**inputs, "x": inputs["x"].copy()}
    x = spoilt["x"][0]
    x[:, 0], x[0, 1], x[1, 2], x[:, 3], x[:, 4] = np.nan, np.inf, -np.inf, 1e-42, 0
    found = run(spoilt)
    np.testing.assert_array_equal(found[1], ordinary[1])
    np.testing.assert_array_equal(found[0, :, 4:], ordinary[0, :, 4:])
    np.testing.assert_array_equal(found[0, :, 3], ordinary[0, :, 4])
    assert not np.isfinite(found[0, :, 1:3]).any()
    if backend == "onnxruntime":
        assert np.isnan(found[0, :, 0]).all()
    expected = apply(model, table)(spoilt)
    np.testing.assert_allclose(found[0, :, 3:], expected[0, :, 3:], rtol=1e-5, atol=1e-6)


def test_a_backend_that_has_no_integer_form_fails_the_build_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime_build, "INTEGER_PRODUCTS", set())
    path = tmp_path / "model.onnx"
    table = make_table(support.tiny_model(), Kind(dynamic=True))
    write(path, *support.exported(ExportConfig(attention="float"), table=table))
    with pytest.raises(BackendError, match=r"10 quantized .*float on onnxruntime: blocks.0.attn.proj"):
        build_engine(path, tmp_path / "model.engine", "onnxruntime", FLOAT32)
    assert not (tmp_path / "model.engine").exists()


def test_the_scale_of_a_token_stays_float32_in_float16_graphs(tmp_path):
    """Sums of integers, and scales of tokens with small values, leave the range of float16."""
    path = tmp_path / "model.onnx"
    table = make_table(support.tiny_model(), Kind(dynamic=True))
    write(path, *support.exported(ExportConfig(attention="float"), table=table))
    file = OnnxFile.read(path)
    model = file.to_ir()
    cast_floats(model, file.own_card, "fp16")
    maxima = [node for node in model.graph if node.name.endswith("/Max")]
    assert len(maxima) == EVERY_LINEAR
    assert {value.dtype for node in maxima for value in (*node.inputs, *node.outputs)} == {ir.DataType.FLOAT}


def test_tables_with_static_and_dynamic_inputs_side_by_side(tmp_path):
    model = support.tiny_model()
    static, dynamic = (make_table(model, Kind(dynamic=dynamic)) for dynamic in (False, True))
    sites = tuple(
        other if ".mlp." in site.name else site for site, other in zip(static.sites, dynamic.sites, strict=True)
    )
    table = replace(static, sites=sites)
    path = tmp_path / "model.onnx"
    write(path, *support.exported(ExportConfig(attention="float"), table=table))
    run, manifest = engine(path, "onnxruntime")
    assert manifest.audit.fallen_back == ()
    inputs = random_rows(model.signature, 24, last=999)
    support.assert_agrees(run(inputs), apply(model, exported_sites(table, "float"))(inputs))
