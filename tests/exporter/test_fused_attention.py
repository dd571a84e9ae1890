"""`--attention fused`: one MultiRegionIntegerAttention per block, whose body in ONNX Runtime equals the fake-quantized
model; one MultiRegionAttention where q and k are float.

Tolerance as in test_quantized.py: a code may flip where the last bit of a float operation decides a rounding tie.
"""

import argparse
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import support
from kernel_device import run_integer_attention
from tables import Kind, make_table, random_rows
from tqdit.cli import export as cli
from tqdit.engines.build.cast import cast_floats
from tqdit.errors import UsageError
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write
from tqdit.exporter.passes.skipped_quantizer import following_quantizer
from tqdit.lint import lint
from tqdit.onnx_file import read_card
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.granularity import PerTensor
from tqdit.quantization.schemes.symmetric import Symmetric
from tqdit.quantization.schemes.two_region_softmax import TwoRegionSoftmax
from tqdit.quantization.table import ScaleTable

pytestmark = pytest.mark.slow

KINDS = {
    "W8A8": Kind(),
    "W8A8 10 softmax groups": Kind(groups=10),
    "W8A8 numerators, 10 groups": Kind(groups=10, numerators=True),
    "W8A8 10 groups everywhere, asymmetric": Kind(groups=10, everywhere=True, asymmetric=True),
    "W6A6 10 groups everywhere": Kind(6, 6, groups=10, everywhere=True),
    "W4A8 10 softmax groups": Kind(4, 8, groups=10),
    "W8A8 a scale per token": Kind(dynamic=True),
}
OP = "MultiRegionIntegerAttention"
ATTENTION = {f"blocks.{number}.attn.value_product/{OP}" for number in (0, 1)}
INT8, FLOAT = onnx.TensorProto.INT8, onnx.TensorProto.FLOAT


def fused_file(tmp_path, table, origin="published", graph="denoiser"):
    path = tmp_path / "model.onnx"
    write(path, *support.exported(ExportConfig(graph=graph, attention="fused"), origin, table=table))
    return path


def run(path, inputs):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def denoiser_inputs(rows=48, origin="published"):
    """Rows in every group of timesteps."""
    return random_rows(support.tiny_model(origin).signature, rows, last=999)


def with_quantizers(table, change):
    sites = (replace(site, quantizer=change(site)) for site in table.sites if change(site) is not None)
    return ScaleTable(table.model, table.fingerprint, table.boundaries, tuple(sites), 0, 1.5)


@pytest.mark.parametrize(("kind", "origin"), support.few(
    [
        *((kind, "published") for kind in KINDS), ("W8A8 numerators, 10 groups", "diffusers"),
        ("W8A8 10 groups everywhere, asymmetric", "diffusers"),
    ],
    ("W8A8", "published"), ("W8A8 numerators, 10 groups", "published"), ("W6A6 10 groups everywhere", "published"),
    ("W8A8 10 groups everywhere, asymmetric", "diffusers"),
))  # fmt: skip
def test_it_equals_the_fake_quantized_model(tmp_path, kind, origin):
    model = support.tiny_model(origin)
    table, inputs = make_table(model, KINDS[kind]), denoiser_inputs(origin=origin)
    path = fused_file(tmp_path, table, origin)
    onnx.checker.check_model(str(path), full_check=True)
    support.assert_agrees(run(path, inputs), apply(model, table)(inputs))


def test_scores_softmax_and_product_are_one_node(tmp_path):
    path = fused_file(tmp_path, make_table(support.tiny_model(), Kind(groups=10)), graph="step")
    model = onnx.load(path)
    named = {node.name: node for node in model.graph.node}
    assert named.keys() >= ATTENTION
    kinds = [node.op_type for node in model.graph.node]
    assert "Softmax" not in kinds
    assert "MultiRegionSoftmax" not in kinds
    assert not [name for name in named if name.startswith("blocks.0.attn.scores/")]
    assert {function.name for function in model.functions} == {OP, "TimeGroupSelect"}
    card = read_card(path).quantization
    assert card.attention == "fused"
    assert card.products["blocks.0.attn.scores"] == card.products["blocks.0.attn.value_product"] == "simulated"


def test_q_k_and_v_enter_as_integer_codes(tmp_path):
    """Their scales are inputs of the node."""
    table = make_table(support.tiny_model(), Kind(groups=10))
    model = onnx.load(fused_file(tmp_path, table))
    named = {node.name: node for node in model.graph.node}
    node = named[f"blocks.0.attn.value_product/{OP}"]
    for value in node.input[:3]:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(value))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, denoiser_inputs())[1:]
    assert [codes.shape for codes in found] == [(48, 2, 16, 8), (48, 2, 16, 8), (48, 2, 8, 16)]
    for codes in found:
        assert codes.dtype == np.int8
        assert len(np.unique(codes)) > 20
    scales = [float(site.quantizer.scale) for site in table.sites if site.module == "blocks.0.attn.scores"]
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    assert constants[node.input[4]] == pytest.approx([scales[0] * scales[1] / 8**0.5], rel=1e-6)
    assert attributes["bits"] == 8


def result_of(path, name="blocks.0.attn"):
    """(out_type of the attention, operators between it and the product of proj, types of what passes there)."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    users = {name: node for node in model.graph.node for name in node.input}
    node = next(node for node in model.graph.node if node.name == f"{name}.value_product/{OP}")
    out_type = next(each.i for each in node.attribute if each.name == "out_type")
    passed, kinds = [], [types[node.output[0]]]
    while node.op_type != "MatMul":
        node = users[node.output[0]]
        passed.append(node.op_type)
        kinds.append(types[node.output[0]])
    return out_type, passed, kinds


@pytest.mark.parametrize("kind", ["W8A8", "W8A8 10 groups everywhere, asymmetric", "W4A8 10 softmax groups"])
def test_the_result_reaches_the_next_product_as_int8(tmp_path, kind):
    """Its quantizer, with the scale and the offset of the row's group, is part of the attention."""
    path = fused_file(tmp_path, make_table(support.tiny_model(), KINDS[kind]))
    out_type, passed, kinds = result_of(path)
    assert out_type == INT8
    assert passed == ["Transpose", "Reshape", "DequantizeLinear", "MatMul"]
    assert kinds == [INT8, INT8, INT8, FLOAT, FLOAT]


@pytest.mark.parametrize("kind", ["W6A6 10 groups everywhere", "W8A8 a scale per token"])
def test_the_result_stays_float_before_a_quantizer_of_another_form(tmp_path, kind):
    """Six bits are clipped first, and a scale per token is only known then."""
    path = fused_file(tmp_path, make_table(support.tiny_model(), KINDS[kind]))
    out_type, passed, kinds = result_of(path)
    assert out_type == FLOAT
    assert kinds[:2] == [FLOAT, FLOAT]
    assert passed[:2] == ["Transpose", "Reshape"]


def test_a_result_that_others_take_too_stays_float():
    """The quantizer of one product is not the other's."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[2,3,4,8] x) => (int8[2,4,24] codes, float[2,4,24] other)
    <float s = {0.5}, int8 z = {0}, int64[3] shape = {2, 4, 24}> {
        moved = Transpose <perm: ints = [0, 2, 1, 3]> (x)
        flat = Reshape (moved, shape)
        codes = QuantizeLinear (flat, s, z)
        other = Neg (flat)
    }"""
    assert following_quantizer(ir.from_onnx_text(text).graph.inputs[0]) is None
    alone = ir.from_onnx_text(text.replace(", float[2,4,24] other", "").replace("other = Neg (flat)", "")).graph
    found = following_quantizer(alone.inputs[0])
    assert (found.scale, found.offset, len(found.moved)) == (0.5, 0, 2)


def test_the_kernel_computes_the_node(tmp_path):
    """The Triton kernel on what reaches the node in the exported graph, against what the body makes of it."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 and Arm only")
    path = fused_file(tmp_path, make_table(support.tiny_model(), Kind(groups=10, everywhere=True)))
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.op_type == OP)
    for value in (*node.input, *node.output):
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(value))
    _, *inputs, body = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, denoiser_inputs()
    )
    names = ("q", "k", "v", "mask", "scale", "low_scale", "out_scale", "out_shift")
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    named = dict(zip(names, inputs, strict=True))
    kernel = run_integer_attention(named, attributes["bits"], attributes["high_scale"], "i8")
    assert body.dtype == np.int8
    assert (kernel != body).any(axis=-1).mean() <= 0.02  # rows of queries with a flipped code


def test_a_softmax_on_one_region_stays_simulated(tmp_path):
    model = support.tiny_model()

    def change(site):
        plain = site.role == "left" and site.module == "blocks.0.attn.value_product"
        return Symmetric(8, PerTensor(), np.float32(1 / 127).reshape(())) if plain else site.quantizer

    table, inputs = with_quantizers(make_table(model, Kind(groups=10)), change), denoiser_inputs()
    path = fused_file(tmp_path, table)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count(OP) == kinds.count("Softmax") == 1
    support.assert_agrees(run(path, inputs), apply(model, table)(inputs))


def test_a_low_scale_that_float16_cannot_count_in_is_refused(tmp_path):
    def change(site):
        if not isinstance(site.quantizer, TwoRegionSoftmax):
            return site.quantizer
        return replace(site.quantizer, low_scale=site.quantizer.high_scale / np.float32(600))

    model = support.tiny_model()
    table = with_quantizers(make_table(model, Kind()), change)
    inputs = denoiser_inputs(8)
    support.assert_agrees(run(fused_file(tmp_path, table), inputs), apply(model, table)(inputs))  # int8 counts apart
    table = with_quantizers(table, lambda site: None if site.module.endswith("scores") else site.quantizer)
    with pytest.raises(UsageError, match=r"value_product' has a low scale 600 times finer .* takes up to 516 times"):
        fused_file(tmp_path, table)


def test_scores_without_sites_are_fused_as_they_are(tmp_path):
    model = support.tiny_model()
    table = with_quantizers(
        make_table(model, Kind(groups=10)), lambda site: None if site.module.endswith("scores") else site.quantizer
    )
    path, inputs = fused_file(tmp_path, table), denoiser_inputs()
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("MultiRegionAttention") == 2
    support.assert_agrees(run(path, inputs), apply(model, table)(inputs))


@pytest.mark.parametrize("float_type", ["fp16", "bf16"])
def test_the_cast_hands_it_the_networks_type(tmp_path, float_type):
    kind = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[float_type]
    single, int8 = ir.DataType.FLOAT, ir.DataType.INT8
    table = make_table(support.tiny_model(), Kind(groups=10))
    floats = with_quantizers(table, lambda site: None if site.module.endswith("scores") else site.quantizer)
    per_token = make_table(support.tiny_model(), Kind(dynamic=True))
    for each, op_type, expected in (
        (table, OP, [int8] * 3 + [single] * 5 + [int8]),
        (per_token, OP, [int8] * 3 + [single] * 5 + [kind]),
        (floats, "MultiRegionAttention", [kind] * 3 + [single] * 2 + [kind]),
    ):
        path = fused_file(tmp_path, each, graph="step")
        model = ir.load(path)
        cast_floats(model, read_card(path), float_type)
        ir.save(model, tmp_path / "cast.onnx")
        onnx.checker.check_model(str(tmp_path / "cast.onnx"), full_check=True)
        nodes = [node for node in model.graph if node.op_type == op_type]
        assert len(nodes) == 2
        for node in nodes:
            assert [value.dtype for value in (*node.inputs, *node.outputs)] == expected
            if op_type == OP:
                assert node.attributes["out_type"].as_int() == int(expected[-1])


def test_in_float16_it_stays_close(tmp_path):
    """2 % of the output (relative L2), as for the other forms in test_cast.py."""
    path = fused_file(tmp_path, make_table(support.tiny_model(), Kind(groups=10)))
    model = ir.load(path)
    cast_floats(model, read_card(path), "fp16")
    ir.save(model, tmp_path / "cast.onnx")
    inputs = denoiser_inputs(16)
    out, expected = run(tmp_path / "cast.onnx", inputs), run(path, inputs)
    assert np.linalg.norm(out - expected) <= 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("graph", ["step", "denoiser"])
def test_the_lint_and_tensorrt_rtx_take_it(tmp_path, graph):
    """TensorRT-RTX inlines the body; in a fresh process, since its first logger stays."""
    path = fused_file(tmp_path, make_table(support.tiny_model(), Kind(groups=10, everywhere=True)), graph=graph)
    model = onnx.load(path)
    for backend in ("onnxruntime", "tensorrt-rtx", "tensorrt"):
        assert not [finding for finding in lint(model, backend) if finding.severity == "error"]
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for Linux on x86-64 only")
    code = (
        "import sys, tensorrt_rtx as trt\n"
        "builder = trt.Builder(trt.Logger(trt.Logger.ERROR))\n"
        "network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))\n"
        "parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))\n"
        "if not parser.parse_from_file(sys.argv[1]):\n"
        "    sys.exit(str(parser.get_error(0)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_takes_the_form():
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    assert parser.parse_args(["--attention", "fused"]).attention == "fused"
