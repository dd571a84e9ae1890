"""The network in float16 or bfloat16 around its integers, with float32 islands."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import support
from tables import Kind, make_table
from tqdit.engines.build.cast import cast_floats
from tqdit.errors import UsageError
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write
from tqdit.graph_names import SCOPE_KEY
from tqdit.onnx_file import read_card

pytestmark = pytest.mark.slow

KINDS = {
    "float": None,
    "W8A8": Kind(groups=10),
    "numerators": Kind(groups=10, numerators=True),
    "asymmetric groups": Kind(asymmetric=True, groups=10, everywhere=True),
}


def cast_file(tmp_path, kind, float_type, graph="step", origin="published"):
    """(float32 file, cast file)."""
    table = None if kind is None else make_table(support.tiny_model(origin), kind)
    path, cast = tmp_path / "model.onnx", tmp_path / "cast.onnx"
    write(path, *support.exported(ExportConfig(graph), origin, table=table))
    model = ir.load(path)
    cast_floats(model, read_card(path), float_type)
    ir.save(model, cast)
    return path, cast


def types(path):
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    known = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {value.name: value.type.tensor_type.elem_type for value in known}, model


@pytest.mark.parametrize(("graph", "float_type", "name"), support.few(
    [(*each, name) for each in (("step", "fp16"), ("denoiser", "bf16")) for name in KINDS],
    ("step", "fp16", "numerators"), ("denoiser", "bf16", "asymmetric groups"), ("denoiser", "bf16", "float"),
))  # fmt: skip
def test_it_is_a_valid_file_with_the_same_inputs_and_outputs(tmp_path, name, float_type, graph):
    path, cast = cast_file(tmp_path, KINDS[name], float_type, graph)
    onnx.checker.check_model(str(cast), full_check=True)
    before, after = onnx.load(path).graph, onnx.load(cast).graph
    assert [*before.input, *before.output] == [*after.input, *after.output]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_float16_stays_close_to_float32(tmp_path, kind):
    """float16 has 11 bits; 2 % of the output (relative L2) leaves room for flipped codes of this coarse model."""
    path, cast = cast_file(tmp_path, kind, "fp16", "denoiser")
    inputs = {
        "x": np.random.default_rng(0).standard_normal((16, 4, 8, 8), np.float32),
        "timestep": np.linspace(0, 999, 16).astype(np.int64),
        "class_labels": np.arange(16) % 6,
    }
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    out, expected = (
        ort.InferenceSession(file, options, providers=["CPUExecutionProvider"]).run(None, inputs)[0]
        for file in (cast, path)
    )
    assert np.linalg.norm(out - expected) <= 0.02 * np.linalg.norm(expected)


def test_quantized_products_and_the_step_are_float32_islands(tmp_path):
    _, cast = cast_file(tmp_path, KINDS["W8A8"], "fp16")
    kinds, model = types(cast)
    half = onnx.TensorProto.FLOAT16
    of = {node.name: [kinds[value] for value in node.output if value in kinds] for node in model.graph.node}
    for name in ("blocks.0.attn.qkv/MatMul", "blocks.0.mlp.fc2/Add", "blocks.1.attn.softmax/MultiRegionSoftmax",
                 "t_embedder/Cos", "graph/Exp"):  # fmt: skip
        assert of[name] == [onnx.TensorProto.FLOAT], name
    for name in ("blocks.0.norm1/LayerNormalization", "blocks.0.mlp.act/Gelu", "blocks.1/Add"):
        assert of[name] == [half], name
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert half not in of[node.name]


def test_float_weights_are_halved(tmp_path):
    path, cast = cast_file(tmp_path, None, "fp16")
    sizes = [
        sum(len(tensor.raw_data) for tensor in onnx.load(file).graph.initializer if "weight" in tensor.name)
        for file in (path, cast)
    ]
    assert sizes[1] < 0.7 * sizes[0]


def test_a_constant_beyond_float16_is_refused(tmp_path):
    path, _ = cast_file(tmp_path, None, "bf16")
    model = ir.load(path)
    value = model.graph.initializers["blocks.0.mlp.fc1.bias"]
    value.const_value = ir.tensor(np.full(64, 7e4, np.float32), name=value.name)
    with pytest.raises(
        UsageError, match=r"'blocks\.0\.mlp\.fc1\.bias' holds 7e\+04, beyond float16's 65504.*bf16 or fp32"
    ):
        cast_floats(model, read_card(path), "fp16")


@pytest.mark.parametrize("float_type", ["fp16", "bf16"])
def test_nodes_that_make_float32_of_other_types_are_cast_too(float_type):
    """Masks become numbers by a Cast, zeros come from ConstantOfShape: neither follows the type of an input."""
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    nodes = [
        node("Cast", ["mask"], ["numbers"], to=onnx.TensorProto.FLOAT),
        node("ConstantOfShape", ["shape"], ["zeros"]),
        node("Sub", ["numbers", "zeros"], ["bias"]),
        node("Add", ["x", "bias"], ["sum"]),
        node("Identity", ["sum"], ["out"]),
    ]
    for each in nodes:
        each.metadata_props.add(key=SCOPE_KEY, value="block")
    floats, integers = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    inputs = [value("x", floats, [2]), value("mask", integers, [2])]
    shape = onnx.helper.make_tensor("shape", integers, [1], [2])
    graph = onnx.helper.make_graph(nodes, "g", inputs, [value("out", floats, [2])], [shape])
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)]))
    cast_floats(model, support.exported(ExportConfig())[1], float_type)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    to = {each.name or each.output[0]: each.attribute[0].i for each in proto.graph.node if each.op_type == "Cast"}
    assert to["numbers"] != floats


def test_the_number_of_a_masked_score_becomes_that_of_float16():
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    add = node("Add", ["x", "mask"], ["sum"])
    add.metadata_props.add(key=SCOPE_KEY, value="block")
    floats, lowest = onnx.TensorProto.FLOAT, float(np.finfo(np.float32).min)
    graph = onnx.helper.make_graph(
        [add, node("Identity", ["sum"], ["out"])], "g", [value("x", floats, [2])], [value("out", floats, [2])],
        [onnx.helper.make_tensor("mask", floats, [2], [0.0, lowest])],
    )  # fmt: skip
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)]))
    cast_floats(model, support.exported(ExportConfig())[1], "fp16")
    made = [each.const_value.numpy() for each in model.graph.initializers.values() if each.dtype == ir.DataType.FLOAT16]
    np.testing.assert_array_equal(made[0], np.float16([0, -65504]))
