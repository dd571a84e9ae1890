"""Golden calls: an engine that computes what it should passes; one wrong scale, input or operation is caught."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import support
from tables import Kind, make_table, random_rows
from tqdit.engines.build.engine import build_engine
from tqdit.engines.bundle import read_manifest
from tqdit.engines.config import BuildConfig
from tqdit.engines.run.sampler import Sampler
from tqdit.errors import FileFormatError, VerificationError
from tqdit.exporter.onnx_writer import write
from tqdit.golden import GoldenCalls, relative_errors
from tqdit.onnx_file import OnnxFile
from tqdit.quantization.fake_quant import golden_calls

CALLS = 4


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """An exported file of the tiny model with golden calls."""
    model = support.tiny_model(pixels=True)
    table = make_table(model, Kind(groups=10))
    table = replace(table, golden=golden_calls(model, table, random_rows(model.signature, CALLS)))
    path = tmp_path_factory.mktemp("golden") / "model.onnx"
    write(path, *support.exported(pixels=True, table=table))
    return path


def altered(file, folder, change):
    """A copy of the file with its graph changed."""
    model = onnx.load(file)
    change(model.graph)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def initializer(graph, ending):
    return next(tensor for tensor in graph.initializer if tensor.name.endswith(ending))


def wrong_scale(graph):
    """One input's scale ten times as large, on both of its nodes."""
    scales = [tensor for tensor in graph.initializer if "fc1.input" in tensor.name and tensor.name.endswith("scale")]
    scales[0].CopyFrom(numpy_helper.from_array(10 * numpy_helper.to_array(scales[0]), scales[0].name))


def swapped_input(graph):
    """Two products that take each other's weights."""
    nodes = [node for node in graph.node if node.op_type == "MatMul" and "fc1" in node.name]
    first, second = nodes[0], nodes[-1]
    first.input[1], second.input[1] = second.input[1], first.input[1]


def wrong_op(graph):
    """Another activation."""
    node = next(node for node in graph.node if node.op_type == "Sigmoid")
    node.op_type = "Tanh"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_engine_that_is_right_passes(file, tmp_path, backend):
    manifest = build_engine(file, tmp_path / "model.engine", backend)
    golden = OnnxFile.read(file).golden
    assert manifest.verified == read_manifest(tmp_path / "model.engine").verified
    assert manifest.verified.calls == len(golden) == CALLS
    assert manifest.verified.expected == pytest.approx(golden.errors.mean())
    assert manifest.verified.error == pytest.approx(golden.errors.mean(), rel=0.1)
    Sampler.open(tmp_path / "model.engine", verify=True)


@pytest.mark.parametrize("change", [wrong_scale, swapped_input, wrong_op], ids=lambda change: change.__name__)
def test_an_engine_that_is_wrong_is_refused_with_both_errors(file, tmp_path, change):
    with pytest.raises(VerificationError, match=r"call \d with .* \(expected .*\)"):
        build_engine(altered(file, tmp_path, change), tmp_path / "model.engine", "onnxruntime")
    assert not (tmp_path / "model.engine").exists()


def test_a_float_engine_of_a_quantized_file_is_verified_too(file, tmp_path):
    """Its weights keep their rounding, so its error lies between none and that of the quantized network."""
    manifest = build_engine(file, tmp_path / "model.engine", "onnxruntime", BuildConfig(precision="fp32"))
    assert 0 < manifest.verified.error < manifest.verified.expected


def test_an_engine_without_golden_calls_cannot_be_verified(tmp_path):
    write(tmp_path / "model.onnx", *support.exported(pixels=True))
    build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", "onnxruntime")
    with pytest.raises(VerificationError, match="no golden calls"):
        Sampler.open(tmp_path / "model.engine", verify=True)


def test_errors_are_relative_to_each_call_and_infinite_for_nan():
    reference = np.float32([[3, 4], [0, 2]])
    found = np.float32([[3, 5], [np.nan, 2]])
    np.testing.assert_allclose(relative_errors(found, reference), [1 / 25, np.inf])


@pytest.mark.parametrize("text", ["", "no base64 !", "AAAA"])
def test_damaged_text_is_refused_by_name(text):
    with pytest.raises(FileFormatError, match=r"model\.onnx.*damaged"):
        GoldenCalls.from_text(text, "model.onnx")
