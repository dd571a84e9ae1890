"""Products that write float16, as TensorRT gets them: right in NumPy and ONNX Runtime, and so compiled."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

import support
from tables import Kind, make_table, random_rows
from tqdit.engines.backends.tensorrt.half_products import LARGEST, halve_products, probabilities, shift_bits
from tqdit.engines.build.cast import cast_floats
from tqdit.engines.config import BatchRange, BuildConfig
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write
from tqdit.onnx_file import read_card

SPEC = importlib.util.spec_from_file_location(
    "tensorrt_kernels", Path(__file__).parents[3] / "scripts" / "tensorrt_kernels.py"
)
script = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = script
SPEC.loader.exec_module(script)

ROUNDING = 2.0**-11  # of float16, relative
KINDS = {
    "two regions": (Kind(groups=10), "simulated"),
    "groups everywhere": (Kind(asymmetric=True, groups=10, everywhere=True), "simulated"),
    "per token": (Kind(dynamic=True), "simulated"),
    "six bits": (Kind(weight_bits=6, activation_bits=6, groups=10), "simulated"),
    "one region": (Kind(uniform_softmax=True), "simulated"),
    "numerators": (Kind(groups=10, numerators=True), "integer"),
    "integer attention": (Kind(groups=10), "integer"),
    "float attention": (Kind(groups=10), "float"),
}


@given(st.integers(1, 1 << 16), st.sampled_from([(127, 127), (-128, -128), (-128, 127), (1, 1), (0, 127)]))
def test_no_sum_overflows_and_each_is_rounded_once(length, codes):
    total = length * codes[0] * codes[1]
    unit = 2.0 ** -shift_bits(length)
    half = np.float16(np.float32(total) * np.float32(unit))
    assert np.isfinite(half)
    assert abs(float(half) - total * unit) <= ROUNDING * abs(total * unit)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6000))
def test_random_products_are_rounded_once(seed, length):
    rng = np.random.default_rng(seed)
    x, w = rng.integers(-128, 128, (2, length)), rng.integers(-128, 128, (length, 4))
    exact = (x @ w) * 2.0 ** -shift_bits(length)
    half = exact.astype(np.float16).astype(np.float64)
    assert np.all(np.abs(half - exact) <= ROUNDING * np.abs(exact))


@pytest.mark.parametrize("length", [1, 3, 4, 72, 1152, 4608, 65536])
def test_as_few_bits_as_keep_the_largest_sum_finite(length):
    bits = shift_bits(length)
    assert length * 2.0 ** (14 - bits) <= LARGEST
    assert bits == 0 or length * 2.0 ** (15 - bits) > LARGEST


PRODUCT = """
<ir_version: 10, opset_import: ["": 20]>
g (float[N, 300] x) => (float[N, 5] y)
<float x_scale = {0.037}, int8 zero = {0}>
{
  codes = QuantizeLinear(x, x_scale, zero)
  left = DequantizeLinear(codes, x_scale, zero)
  right = DequantizeLinear<axis = 1>(w, w_scale)
  product = MatMul(left, right)
  y = Add(product, bias)
}
"""


def test_one_product_equals_numpy():
    """float16 scales its result once: 2^-11 of the product, then the float32 of the Mul and the Add."""
    rng = np.random.default_rng(0)
    w = rng.integers(-127, 128, (300, 5)).astype(np.int8)
    w_scale, bias = rng.uniform(1e-4, 1e-2, 5).astype(np.float32), rng.standard_normal(5).astype(np.float32)
    x = rng.uniform(-5, 5, (4, 300)).astype(np.float32)
    model = onnx.parser.parse_model(PRODUCT)
    for name, array in {"w": w, "w_scale": w_scale, "bias": bias}.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    model.graph.node[3].name = "product"
    assert halve_products(model, Path(), frozenset()) == 1
    onnx.checker.check_model(model, full_check=True)
    assert script.round_products(model) == 1
    codes = np.clip(np.rint(x / np.float32(0.037)), -128, 127).astype(np.int64)
    half = np.float16((codes @ w.astype(np.int64)) * 2.0 ** -shift_bits(300)).astype(np.float64)
    expected = half * (np.float64(np.float32(0.037)) * w_scale * 2.0 ** shift_bits(300)) + bias
    np.testing.assert_allclose(script.run_on_cpu(model, {"x": x}), expected, rtol=1e-6, atol=1e-6)


def prepared(tmp_path, kind, form):
    """(cast to float16, the same with float16 products, how many); functions inlined."""
    path = tmp_path / "model.onnx"
    write(path, *support.exported(ExportConfig(attention=form), table=make_table(support.tiny_model(), kind)))
    model = ir.load(path)
    card = read_card(path)
    cast_floats(model, card, "fp16")
    proto = ir.to_proto(model)
    before = onnx.inliner.inline_local_functions(proto)
    after = onnx.ModelProto()
    after.CopyFrom(before)
    return before, after, halve_products(after, tmp_path, probabilities(proto)), card


SHOWN = support.few(KINDS, "groups everywhere", "per token", "numerators")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_every_quantized_product_of_a_network_writes_float16(tmp_path, name):
    before, after, number, card = prepared(tmp_path, *KINDS[name])
    onnx.checker.check_model(after, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(after, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    products = [node for node in after.graph.node if node.op_type == "MatMul"]
    names = [node.name for node in before.graph.node if node.op_type == "MatMul"]
    assert [node.name for node in products] == names  # which the audit knows
    halved = [node for node in products if node.output[0].endswith("/half")]
    assert {kinds[node.output[0]] for node in halved} == {TensorProto.FLOAT16}
    modules = {node.name.rpartition("/")[0] for node in halved}
    assert modules == {name for name, one in card.quantization.products.items() if one in ("integer", "simulated")}
    assert len(halved) == number
    units = [numpy_helper.to_array(each) for each in after.graph.initializer if each.name.endswith("half.left.unit")]
    assert units
    assert all(math.frexp(float(unit))[0] == 0.5 for unit in units)  # powers of two


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_the_network_stays_as_right_as_it_was(tmp_path, name):
    """Exactly computed it is the same network except the order of float32's factors, which may flip a code of one row
    or two (which ones depends on the processor). Rounded, codes flip behind the products of this coarse model (3 % of
    the output, relative L2), but its error against the float network stays.
    """
    before, after, number, _ = prepared(tmp_path, *KINDS[name])
    write(tmp_path / "float.onnx", *support.exported())
    inputs = random_rows(support.tiny_model().signature, 16)
    network, expected, exact = (
        script.run_on_cpu(model, inputs) for model in (onnx.load(tmp_path / "float.onnx"), before, after)
    )
    assert script.round_products(after) == number
    rounded = script.run_on_cpu(after, inputs)
    size, error = np.linalg.norm(expected), np.linalg.norm(expected - network)
    off = np.linalg.norm((exact - expected).reshape(16, -1), axis=1)
    assert (off <= 1e-4 * size / 4).sum() >= 14  # a row has a quarter of the size of all sixteen
    assert np.linalg.norm(off) <= 0.03 * size
    assert 0 < np.linalg.norm(rounded - expected) <= 0.03 * size
    assert np.linalg.norm(rounded - network) <= 1.05 * error


@pytest.mark.slow
def test_a_module_can_be_kept(tmp_path):
    before, _, number, _ = prepared(tmp_path, *KINDS["two regions"])
    module = "blocks.0.mlp.fc2"  # two products
    assert halve_products(before, tmp_path, frozenset(), kept={module, "blocks.0.attn.value_product"}) < number
    outputs = {node.output[0] for node in before.graph.node if node.name.startswith(f"{module}/MatMul")}
    assert not [name for name in outputs if name.endswith("/half")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "float_type", "kind"),
    support.few(
        [("simulated", "fp16", "Half"), ("integer", "fp16", "Half"), ("float", "bf16", "BFloat16")],
        ("integer", "fp16", "Half"), ("float", "bf16", "BFloat16"),
    ),
)  # fmt: skip
def test_the_compiler_writes_no_activation_in_float32(tmp_path, form, float_type, kind):
    """As many INT8 products and kernels as with products in float32."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for x86-64 only")
    path, model = tmp_path / "model.onnx", support.tiny_model()
    write(path, *support.exported(ExportConfig(attention=form), table=make_table(model, Kind(groups=10))))
    config = BuildConfig(targets=("8.9",), batch=BatchRange(2, 2, 2), float_type=float_type)
    wide, half = (script.build_layers(path, config, halved) for halved in (False, True))
    assert {one.outputs for one in half if one.is_integer} == {(kind,)}
    assert sum(one.is_integer for one in half) == sum(one.is_integer for one in wide) > 0
    activation = 4 * 16 * 16  # rows, tokens, width
    before, after = (script.block_layers(layers, 0) for layers in (wide, half))
    assert [size for size in float32_sizes(before) if size >= activation]
    assert [size for size in float32_sizes(after) if size >= activation] == []
    assert len(after) <= len(before)
    assert script.figures(after).written < 0.8 * script.figures(before).written


def float32_sizes(layers):
    """Elements of each float32 tensor that a kernel writes."""
    outputs = [output for layer in layers for output in zip(layer.outputs, layer.shapes, strict=True)]
    return [math.prod(shape) for kind, shape in outputs if kind == "Float"]


@pytest.mark.slow
def test_scales_that_lie_beside_the_file_are_found(tmp_path):
    """As in large models, of which only the graph is in memory."""
    before, _, number, _ = prepared(tmp_path, *KINDS["two regions"])
    inputs = random_rows(support.tiny_model().signature, 2)
    expected = script.run_on_cpu(before, inputs)
    onnx.save(before, tmp_path / "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    model = onnx.load(tmp_path / "big.onnx", load_external_data=False)
    rounded = probabilities(onnx.load(tmp_path / "model.onnx"))
    assert halve_products(model, tmp_path, rounded) == number
    onnx.save(model, tmp_path / "half.onnx")
    found = script.run_on_cpu(onnx.load(tmp_path / "half.onnx"), inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
