"""Products as ONNX Runtime's own operator: the same values, one node each, and codes that the CPU adds exactly."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import support
from tables import Kind, make_table, random_rows
from tqdit.engines import cpu
from tqdit.engines.backends.onnxruntime.editing import INTEGER_PRODUCT
from tqdit.engines.backends.onnxruntime.products import write_products
from tqdit.engines.backends.onnxruntime.weight_only import write_weight_only_products
from tqdit.engines.build.engine import build_engine
from tqdit.engines.build.regions import sum_regions
from tqdit.engines.bundle import read_manifest
from tqdit.engines.run.backend import open_engine
from tqdit.errors import BackendError
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write
from tqdit.graph_names import scope_of

KINDS = {
    "10 groups": Kind(groups=10, everywhere=True),
    "offsets": Kind(asymmetric=True),
    "numerators": Kind(groups=10, numerators=True),
    "W6A6": Kind(6, 6, asymmetric=True),
    "uniform": Kind(uniform_softmax=True),
}


def file_of(folder, kind):
    """A W8A8 file of the tiny pixel model, its card and eight rows."""
    model = support.tiny_model(pixels=True)
    graph, card = support.exported(ExportConfig(attention="integer"), pixels=True, table=make_table(model, kind))
    write(folder / "model.onnx", graph, card)
    return onnx.load(folder / "model.onnx"), card, random_rows(model.signature, 8)


def run(model, rows, level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL):
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, rows)[0]


def modules_of(card, form):
    return {module for module, found in card.quantization.products.items() if found == form}


def products_in(model):
    return [node for node in model.graph.node if node.op_type == INTEGER_PRODUCT]


@pytest.mark.slow
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_values_stay_and_no_product_is_left_to_the_optimizer(tmp_path, kind, signed):
    """Codes are the same but for ties that float rounding decides, here none: 1e-5 of the largest value."""
    model, card, rows = file_of(tmp_path, KINDS[kind])
    sum_regions(model)
    expected = run(model, rows)
    before = len(model.graph.node)
    write_products(model, tmp_path, modules_of(card, "integer"), signed)
    np.testing.assert_allclose(run(model, rows), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    left = {scope_of(node) for node in model.graph.node if node.op_type == "MatMul"}
    assert not left & modules_of(card, "integer")
    assert {scope_of(node) for node in products_in(model)} == modules_of(card, "integer")
    assert len(model.graph.node) < before or not signed  # weights are converted by nodes
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    zeros = {(types[node.input[4]], types[node.input[5]]) for node in products_in(model)}
    assert zeros == {(TensorProto.UINT8, TensorProto.INT8 if signed else TensorProto.UINT8)}


@pytest.mark.slow
def test_biases_factors_and_offsets_go_into_the_product(tmp_path):
    model, card, _ = file_of(tmp_path, Kind(asymmetric=True, uniform_softmax=True))
    write_products(model, tmp_path, modules_of(card, "integer"), signed=True)
    around = {
        (scope_of(node), node.op_type)
        for node in model.graph.node
        if scope_of(node) in modules_of(card, "integer") and node.op_type in ("Add", "Mul", "Sub")
    }
    assert around == {(f"blocks.{block}.mlp.fc2", "Add") for block in range(2)}  # of two regions, a sum of two products
    assert any(len(node.input) == 7 for node in products_in(model))


def codes_read_twice():
    """x -> Q -> DQ -> MatMul by a weight, where the graph also returns what was dequantized."""
    tensors = {"s": np.float32(0.1), "z": np.int8(0), "w": np.full((4, 3), 2, np.int8), "t": np.ones(3, np.float32)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["left"]),
        helper.make_node("DequantizeLinear", ["w", "t"], ["right"], axis=1),
        helper.make_node("MatMul", ["left", "right"], ["y"], name="product"),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["rounded"]),
    ]
    for node in nodes:
        node.metadata_props.add(key="tqdit.scope", value="layer")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", None]) for name in ("y", "rounded")]
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])], values,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_codes_that_something_else_reads_stay_as_they_are():
    model = codes_read_twice()
    before = model.SerializeToString()
    write_products(model, None, {"layer"}, signed=True)
    assert model.SerializeToString() == before


def weight_only(rows, weight, scale):
    """A file with one product of floats by an int8 weight, and its input."""
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["right"], name="dequantize", axis=1),
        helper.make_node("MatMul", ["x", "right"], ["product"], name="layer/MatMul"),
        helper.make_node("Identity", ["product"], ["y"]),
    ]
    for node in nodes[:2]:
        node.metadata_props.add(key="tqdit.scope", value="layer")
    shape = ["batch", *rows.shape[1:]]
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(scale, "s")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_three_digits_are_a_float(tmp_path):
    """Against float64: as near as a product of float32, whatever a row's size; rows of zeros and huge rows beside."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 300)).astype(np.float32) * np.float32([[1], [1e-6], [0], [1e4], [1], [1e-20]])
    rows[4] = rng.standard_t(1.5, 300)  # heavy tails
    weight = rng.integers(-128, 128, (300, 70)).astype(np.int8)
    scale = rng.uniform(1e-3, 1e-2, 70).astype(np.float32)
    model = weight_only(rows, weight, scale)
    assert write_weight_only_products(model, tmp_path, ["layer", "another"]) == {"layer"}
    assert [node.op_type for node in model.graph.node].count(INTEGER_PRODUCT) == 1
    found = run(model, {"x": rows})
    exact = rows.astype(np.float64) @ (weight.astype(np.float64) * scale)
    bound = np.abs(rows).max(axis=1, keepdims=True) * np.sqrt(len(weight)) * 128 * scale.max() * 2.0**-23
    assert (np.abs(found - exact) <= bound).all()
    assert (found[2] == 0).all()
    for number in range(len(rows)):  # whatever stands beside it
        np.testing.assert_array_equal(run(model, {"x": rows[number : number + 1]})[0], found[number])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=300),  # tokens
        lambda model: model.graph.node[0].attribute.append(helper.make_attribute("block_size", 2)),
        lambda model: model.graph.initializer[0].CopyFrom(  # int4
            helper.make_tensor("w", TensorProto.INT4, (300, 70), np.zeros(300 * 70, np.int8))
        ),
        lambda model: model.graph.node.append(helper.make_node("Identity", ["right"], ["again"])),
    ],
    ids=["tokens", "blocks", "int4", "a weight that another node reads"],
)
def test_other_products_of_a_weight_alone_stay(tmp_path, change):
    rows = np.ones((2, 300), np.float32)
    model = weight_only(rows, np.ones((300, 70), np.int8), np.ones(70, np.float32))
    change(model)
    before = model.SerializeToString()
    assert write_weight_only_products(model, tmp_path, ["layer"]) == set()
    assert model.SerializeToString() == before


@pytest.mark.slow
def test_an_engine_holds_its_weights_as_integers_and_adds_in_32_bits(tmp_path):
    """The optimised graph, as it is run: no product of floats but those that the scale table leaves in float."""
    _, card, _ = file_of(tmp_path, Kind(groups=10))
    manifest = build_engine(tmp_path / "model.onnx", tmp_path / "engine", "onnxruntime")
    graph = onnx.load(tmp_path / "engine" / manifest.entry)
    written = {node.name.partition("/")[0] for node in products_in(graph)}
    few = {module for module in modules_of(card, "weight-only") if "adaLN" in module or "t_embedder" in module}
    assert few
    assert few | modules_of(card, "integer") <= written
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    assert {types[node.input[5]] for node in products_in(graph)} == {TensorProto.INT8}


@pytest.mark.slow
def test_an_engine_of_a_cpu_without_wide_sums_runs_everywhere_but_not_the_other_way_round(tmp_path, monkeypatch):
    """Products of uint8 by uint8 alone, for which such CPUs have exact kernels; seen in the graph, since this CPU adds
    all of them in 32 bits.
    """
    file_of(tmp_path, Kind(groups=10))
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "features", lambda: ("avx2", "avx512_vnni"))
    build_engine(tmp_path / "model.onnx", tmp_path / "wide", "onnxruntime")
    monkeypatch.setattr(cpu, "features", lambda: ("avx2", "avx512f"))
    manifest = build_engine(tmp_path / "model.onnx", tmp_path / "narrow", "onnxruntime")
    graph = onnx.load(tmp_path / "narrow" / manifest.entry)
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    zeros = {(types[node.input[4]], types[node.input[5]]) for node in products_in(graph)}
    assert zeros == {(TensorProto.UINT8, TensorProto.UINT8)}
    assert manifest.audit.fallen_back == ()
    for features in (("avx2", "avx512f"), ("avx2", "avx_vnni"), ()):
        monkeypatch.setattr(cpu, "features", lambda features=features: features)
        open_engine(tmp_path / "narrow", manifest, manifest.entry, 1).close()
    monkeypatch.setattr(cpu, "features", lambda: ("avx2",))
    wide = read_manifest(tmp_path / "wide")
    with pytest.raises(BackendError, match=r"built for a CPU with VNNI or AMX.*Build the engine here"):
        open_engine(tmp_path / "wide", wide, wide.entry, 1)
