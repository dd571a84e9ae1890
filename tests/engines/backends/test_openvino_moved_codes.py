"""Quantizers before the operations that only rearrange values: the same codes, moved as int8."""

import numpy as np
import onnx
import onnxruntime as ort
import openvino
import pytest
from onnx import TensorProto, helper, numpy_helper

import support
from tables import Kind, make_table, random_rows
from tqdit.engines.backends.openvino import build
from tqdit.engines.backends.openvino.moved_codes import move_codes, moves_floats
from tqdit.engines.build.engine import build_engine
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write

pytestmark = pytest.mark.slow


def file_of(folder, kind, origin="published"):
    """An export with integer attention: one layer makes q, k and v, or three in diffusers' module; and its rows."""
    model = support.tiny_model(origin, pixels=origin == "published")
    graph = support.exported(ExportConfig(), origin, pixels=origin == "published", table=make_table(model, kind))
    write(folder / "model.onnx", *graph)
    return onnx.load(folder / "model.onnx"), random_rows(model.signature, 8)


def run(model, rows):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, rows)[0]


@pytest.mark.parametrize(
    ("kind", "origin", "moved", "tolerance"),
    [
        # One quantizer in the place of three, so codes may flip at ties; and that of the layer behind attention.
        (Kind(), "published", 4, 1e-2),
        (Kind(asymmetric=True), "published", 4, 1e-2),
        (Kind(groups=10), "diffusers", 8, 0),
    ],
    ids=["symmetric", "asymmetric", "diffusers"],
)
def test_the_values_stay(tmp_path, kind, origin, moved, tolerance):
    model, rows = file_of(tmp_path, kind, origin)
    assert moves_floats(model)
    expected = run(model, rows)
    assert move_codes(model, tmp_path) == moved
    onnx.checker.check_model(model, full_check=True)
    found = run(model, rows)
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)
    assert move_codes(model, tmp_path) == 0


@pytest.mark.parametrize("origin", ["published", "diffusers"])
def test_the_compiled_layers_give_codes_and_codes_are_moved(tmp_path, origin):
    file_of(tmp_path, Kind(), origin)
    audit = build_engine(tmp_path / "model.onnx", tmp_path / "a.engine", "openvino").audit
    assert (audit.integer, audit.fallen_back) == (14 if origin == "published" else 18, ())
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(tmp_path / "a.engine" / build.GRAPH_FILE), "CPU")
    layers = [layer for layer in compiled.get_runtime_model().get_ops() if len(layer.outputs()) == 1]
    made = {"i8": 0, "f32": 0}
    for layer in layers:
        kind = layer.get_rt_info()["layerType"].astype(str)
        names = layer.get_rt_info()["originalLayersNames"].astype(str)
        is_linear = any(f".attn.{name}/" in names for name in ("qkv", "to_q", "to_k", "to_v"))
        if ".attn" in names and (kind == "Transpose" or (kind == "FullyConnected" and is_linear)):
            made[layer.get_output_element_type(0).get_type_name()] += 1
    assert made["i8"] >= (4 if origin == "published" else 12)  # of two blocks: layers, and what moves their results
    assert made["f32"] == 0


def graph_of(nodes, scales=(0.1, 0.2), zero=0, outputs=("y",)):
    """x (1, 4) times an int8 weight (4, 8), and what is done with the result."""
    weights = {
        "w": np.arange(-16, 16).reshape(4, 8).astype(np.int8), "t": np.full(8, 0.1, np.float32),
        "bias": np.arange(8, dtype=np.float32), "z": np.int8(zero), "s0": np.float32(scales[0]),
        "s1": np.float32(scales[1]), "shape": np.array([1, 2, 4]), "i0": np.int64(0), "i1": np.int64(1),
        "half": np.float32(0.5),
    }  # fmt: skip
    text = (
        f'<ir_version: 10, opset_import: ["" : 20]> g (float[1, 4] x) => (float {", float ".join(outputs)}) {{'
        "wd = DequantizeLinear<axis = 1>(w, t) p = MatMul(x, wd) linear = Add(p, bias) r = Reshape(linear, shape) "
        f"{nodes} }}"
    )
    model = onnx.parser.parse_model(text)
    for output in model.graph.output:
        output.type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items() if name in used
    )
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    return onnx.shape_inference.infer_shapes(model)


HALVES = (
    "a = Gather<axis = 1>(r, i0) b = Gather<axis = 1>(r, i1) bt = Transpose(b) "
    "qa = QuantizeLinear(a, s0, z) da = DequantizeLinear(qa, s0, z) "
    "qb = QuantizeLinear(bt, s1, z) db = DequantizeLinear(qb, s1, z) "
)
ROWS = {"x": np.array([[0.3, -1.2, 0.7, 2.1]], np.float32)}


def test_columns_of_one_layer_come_to_one_scale():
    model = graph_of(HALVES + "m = MatMul(da, db) y = Mul(m, half)")
    expected = run(model, ROWS)
    assert move_codes(model, None) == 1
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == 1
    assert kinds.count("Mul") == 1  # the factor is part of the number that was there
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    by_columns = [array for name, array in constants.items() if ".columns." in name]
    assert len(by_columns) == 2  # the weight's scale and the bias
    np.testing.assert_allclose(max(by_columns, key=np.max), np.arange(8) * np.repeat([2, 1], 4))
    np.testing.assert_allclose(run(model, ROWS), expected, rtol=1e-6)


STAY = {
    "a zero point": graph_of(HALVES + "y = MatMul(da, db)", zero=3),
    "a result of its own": graph_of(HALVES + "y = MatMul(da, db)", outputs=("y", "r")),
    "another reader": graph_of(HALVES + "m = MatMul(da, db) n = ReduceMax(r) y = Add(m, n)"),
    "another reader of the codes": graph_of(HALVES + "m = MatMul(da, db) y = Add(m, da)"),
    "one part that is not rounded": graph_of(
        "a = Gather<axis = 1>(r, i0) b = Gather<axis = 1>(r, i1) bt = Transpose(b) qa = QuantizeLinear(a, s0, z) "
        "da = DequantizeLinear(qa, s0, z) y = MatMul(da, bt)"
    ),
    "an offset of one of two": graph_of(HALVES.replace("(a, s0", "(a2, s0").replace("qa =", "a2 = Sub(a, half) qa =")
                                        + "y = MatMul(da, db)"),
    "columns with two scales": graph_of(
        "t2 = Transpose<perm = [0, 2, 1]>(r) qa = QuantizeLinear(r, s0, z) da = DequantizeLinear(qa, s0, z) "
        "qb = QuantizeLinear(t2, s1, z) db = DequantizeLinear(qb, s1, z) y = MatMul(da, db)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STAY)
def test_what_is_not_rounded_whole_stays(case):
    model = onnx.ModelProto.FromString(STAY[case].SerializeToString())
    assert moves_floats(model)
    assert move_codes(model, None) == 0
    assert model.graph == STAY[case].graph


def test_equal_scales_need_no_linear_layer():
    model = graph_of(
        "e = Exp(r) a = Transpose<perm = [0, 2, 1]>(e) qa = QuantizeLinear(e, s0, z) da = DequantizeLinear(qa, s0, z) "
        "qb = QuantizeLinear(a, s1, z) db = DequantizeLinear(qb, s1, z) y = MatMul(da, db)",
        scales=(50, 50),
    )
    expected = run(model, ROWS)
    assert move_codes(model, None) == 1
    assert [node.op_type for node in model.graph.node].count("QuantizeLinear") == 1
    np.testing.assert_array_equal(run(model, ROWS), expected)
