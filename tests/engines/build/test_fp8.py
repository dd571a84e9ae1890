"""`--precision fp8`: the linear layers of an int8 file in E4M3."""

import re

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import support
from tables import Kind, make_table, random_rows
from tqdit.engines.build.engine import build_engine
from tqdit.engines.build.fp8 import expect, quantize_to_fp8
from tqdit.engines.bundle import CALLS_FILE
from tqdit.engines.config import BuildConfig
from tqdit.errors import TqditWarning, UsageError
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write
from tqdit.files import read_npz
from tqdit.golden import GoldenCalls
from tqdit.onnx_file import OnnxFile

E4M3 = ml_dtypes.float8_e4m3fn
KINDS = {
    "two regions": Kind(groups=10),
    "groups everywhere": Kind(groups=10, everywhere=True),
    "zero points": Kind(asymmetric=True, groups=10, everywhere=True),
    "per token": Kind(dynamic=True),
    "six bits": Kind(weight_bits=6, activation_bits=6, groups=10),
    "inputs of the conditioning": Kind(conditioning_inputs=True),
}


def files(tmp_path, kind, form="simulated"):
    """(int8 file, the same in FP8)."""
    path = tmp_path / "model.onnx"
    write(path, *support.exported(ExportConfig(attention=form), table=make_table(support.tiny_model(), kind)))
    file = OnnxFile.read(path)
    model = file.to_ir()
    quantize_to_fp8(model, file.own_card)
    ir.save(model, tmp_path / "fp8.onnx")
    return file, tmp_path / "fp8.onnx"


def run(model, inputs, names=None):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(names, inputs)


SHOWN = support.few(KINDS, "zero points", "per token", "inputs of the conditioning")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_each_layer_is_one_product_of_e4m3(tmp_path, name):
    file, path = files(tmp_path, KINDS[name])
    onnx.checker.check_model(str(path), full_check=True)
    before, after = file.model.graph, onnx.load(path).graph
    makers = {output: node for node in after.node for output in node.output}
    codes = {tensor.name: numpy_helper.to_array(tensor) for tensor in before.initializer}
    constants = {tensor.name: tensor for tensor in after.initializer}
    layers = [name for name, form in file.own_card.quantization.products.items() if form == "integer"]
    assert "blocks.0.mlp.fc2" in layers
    for layer in layers:
        (product,) = (node for node in after.node if node.op_type == "MatMul" and node.name.startswith(f"{layer}/"))
        left, right = (makers[name] for name in product.input)
        quantize = makers[left.input[0]]
        assert [node.op_type for node in (quantize, left, right)] == ["QuantizeLinear", *["DequantizeLinear"] * 2]
        for zero in (quantize.input[2], left.input[2], right.input[0]):
            assert constants[zero].data_type == TensorProto.FLOAT8E4M3FN
        rounded = codes[f"{layer}.weight.codes"].astype(np.float32).astype(E4M3)
        assert np.array_equal(numpy_helper.to_array(constants[right.input[0]]).view(np.uint8), rounded.view(np.uint8))
        assert right.input[1] == f"{layer}.weight.scale"
        pattern = re.compile(rf"{layer}\.input\.(.*\.)?scale")
        scales = [float(array) for name, array in codes.items() if pattern.fullmatch(name)]
        assert float(numpy_helper.to_array(constants[quantize.input[1]])) == max(scales)


@pytest.mark.slow
def test_a_layer_equals_numpy(tmp_path):
    """fc2 behind its GELU: E4M3(x / s) s times E4M3(c) t; E4M3 ties to even, and so does ml_dtypes."""
    _, path = files(tmp_path, KINDS["two regions"])
    model = onnx.load(path)
    nodes = {node.name: node for node in model.graph.node}
    (name,) = (name for name in nodes if name.startswith("blocks.0.mlp.fc2/MatMul"))
    gelu = nodes["blocks.0.mlp.act/Gelu"].output[0]
    for value in (gelu, nodes[name].output[0]):
        model.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))
    x, y = run(model, random_rows(support.tiny_model().signature, 4), [gelu, nodes[name].output[0]])
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    scale = constants["blocks.0.mlp.fc2.input.positive.scale"]
    weight = constants["blocks.0.mlp.fc2.weight.fp8"].astype(np.float64) * constants["blocks.0.mlp.fc2.weight.scale"]
    rounded = (x / scale).astype(E4M3).astype(np.float64) * scale
    np.testing.assert_allclose(y, rounded @ weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_the_network_stays_near_the_float_one(tmp_path, name):
    """E4M3 rounds by up to 2^-4, so 0.1 of the output (relative L2) is what a few layers make of it; six bits and the
    wandering scales of the int8 file come on top.
    """
    file, path = files(tmp_path, KINDS[name])
    write(tmp_path / "float.onnx", *support.exported())
    inputs = random_rows(support.tiny_model().signature, 16)
    expected, int8, fp8 = (run(onnx.load(one), inputs)[0] for one in (tmp_path / "float.onnx", file.path, path))
    size = np.linalg.norm(expected)
    error = np.linalg.norm(int8 - expected) / size
    assert 0 < np.linalg.norm(fp8 - expected) / size <= 0.1 + error
    assert not np.array_equal(int8, fp8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Kind(groups=10, everywhere=True), Kind(numerators=True), Kind(6, 6)])
def test_integer_attention_becomes_float(tmp_path, kind):
    """A file with it is the same in FP8 as one with float attention: the same values, and the card says so."""
    inputs, results = random_rows(support.tiny_model().signature, 4), []
    for form in ("integer", "float"):
        (tmp_path / form).mkdir()
        file, path = files(tmp_path / form, kind, form)
        quantization = quantize_to_fp8(file.to_ir(), file.own_card).quantization
        results.append((run(onnx.load(path), inputs)[0], quantization))
    (found, card), (expected, known) = results
    np.testing.assert_array_equal(found, expected)
    assert (card.attention, card.products) == (known.attention, known.products)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "form", "message"),
    [
        (Kind(groups=10), "fused", r"'blocks\.0\.attn\.proj' takes int8 from a fused attention.*--attention float"),
        (Kind(dynamic=True, asymmetric=True), "float", r"'.*' has an offset for each token.*--inputs"),
    ],
)
def test_what_has_no_form_in_fp8_is_refused(tmp_path, kind, form, message):
    with pytest.raises(UsageError, match=message):
        files(tmp_path, kind, form)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "targets", "message"),
    [
        ("onnxruntime", (), "--precision fp8: onnxruntime has no FP8 products"),
        ("openvino", (), "--precision fp8: openvino has no FP8 products"),
        ("tensorrt-rtx", ("8.6", "8.9"), "compute capability 8.6 has no FP8 products"),
    ],
)
def test_what_cannot_run_fp8_is_refused(quantized, tmp_path, backend, targets, message):
    with pytest.raises(UsageError, match=message):
        build_engine(quantized, tmp_path / "a.engine", backend, BuildConfig(precision="fp8", targets=targets))
    assert not (tmp_path / "a.engine").exists()


@pytest.mark.slow
def test_a_float_file_has_no_fp8(tmp_path):
    write(tmp_path / "float.onnx", *support.exported())
    with pytest.raises(UsageError, match="holds a float graph, asked for fp8"):
        build_engine(tmp_path / "float.onnx", tmp_path / "a.engine", "tensorrt-rtx", BuildConfig(precision="fp8"))


@pytest.mark.slow
def test_an_engine_expects_the_error_that_fp8_has_on_the_cpu(tmp_path):
    """The calls of the bundle carry it; an engine that is worse is refused where it runs."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for x86-64 only")
    file, path = files(tmp_path, KINDS["two regions"])
    write(tmp_path / "float.onnx", *support.exported())
    inputs = random_rows(file.own_card.signature, 3)
    prediction = run(onnx.load(tmp_path / "float.onnx"), inputs)[0]
    calls = GoldenCalls(inputs, prediction, np.full(3, 1e-9))
    model = onnx.load(file.path)
    model.metadata_props.add(key="tqdit_calls", value=calls.to_text())
    onnx.save(model, file.path)
    with pytest.warns(TqditWarning, match=r"fp8 has a mean error of .* int8 of 1\.0e-09"):
        manifest = build_engine(file.path, tmp_path / "a.engine", "tensorrt-rtx", BuildConfig(precision="fp8"))
    assert manifest.audit.line.startswith("quantized products: 10 fp8, 4 simulated by choice")
    assert (manifest.precision, manifest.float_type) == ("fp8", "fp16")
    targets = manifest.target["compute_capabilities"].split(",")
    assert {"8.9", "12.0"} <= set(targets)
    assert "8.6" not in targets
    kept = GoldenCalls.of(read_npz(tmp_path / "a.engine" / CALLS_FILE))
    assert np.array_equal(kept.errors, expect(calls, path, 1).errors)
    assert kept.errors.min() > 1e-6
