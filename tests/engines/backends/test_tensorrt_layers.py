"""Reading the precision of products from an engine's layers."""

from types import SimpleNamespace

import pytest

from tqdit.card import QuantizationCard
from tqdit.engines.backends.tensorrt.builder import audit_layers
from tqdit.engines.backends.tensorrt.layers import Layer, from_inspector, from_log
from tqdit.errors import BackendError
from tqdit.graph_names import SCOPE_KEY, Scopes
from tqdit.sampling.schedule import SamplingSpec

TENSOR = "{{ Name: t, Dimensions: [-1,12], Strides: [12,1], StrideOrder: [1,0], Datatype: {}, Format: (Linear) Row }}"


def line(name, kind, inputs, constants, outputs, metadata, event=""):
    """One layer in the words of TensorRT-RTX 1.7's build log."""
    lists = ["[ " + ", ".join(TENSOR.format(one) for one in group) + "]" for group in (inputs, constants, outputs)]
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: {lists[0]}, Constants: {lists[1]}, Outputs: {lists[2]}, "
        f"TacticName: some_0x1, StreamId: 0, {event}Metadata: {metadata}"
    )


LOG = "\n".join([
    "Layers:",
    line("a/MatMul_myl0_1", "gemm", ["Int8"], ["Int8", "Float", "Float"], ["Float"], "[ONNX Layer: a/MatMul]"),
    line("__myl_MulAdd_2", "kgen", ["Float"], ["Float"], ["Half"], "[ONNX Layer: a/MatMul][ONNX Layer: a/Add]"),
    line("__mye_3", "signal", [], [], [], "", event="EventId: 11, "),
    line("__myl_Fc_4", "runtime_fusion", ["Half"], ["Int8"], ["Half"], "[ONNX Layer: b/MatMul]\x1e[ONNX Layer: b/Add]"),
    "",
    "I/O Tensors:",
    " Name: x, IOMode: Input",
])  # fmt: skip


def layer(kind="gemm", inputs=("Int8",), constants=("Int8",), nodes=(), name="n", tactic="t"):
    return Layer(name, kind, inputs, constants, ("Float",), nodes, tactic)


def test_a_build_log_is_read_layer_by_layer():
    first, second, third, fourth = from_log(["Layers:\nName: of an engine before", "something else", LOG])
    constants = ("Int8", "Float", "Float")
    assert first == Layer(
        "a/MatMul_myl0_1", "gemm", ("Int8",), constants, ("Float",), ("a/MatMul",), "some_0x1", ((-1, 12),)
    )
    assert (second.multiplies, second.nodes) == (False, ("a/MatMul", "a/Add"))
    assert (third.kind, third.inputs, third.nodes) == ("signal", (), ())
    assert (fourth.multiplies, fourth.is_integer, fourth.nodes) == (True, False, ("b/MatMul", "b/Add"))


def test_a_log_that_proves_nothing_is_refused():
    with pytest.raises(BackendError, match="lists no layers"):
        from_log(["Engine generation completed"])
    with pytest.raises(BackendError, match="cannot be read: Name: x, Something"):
        from_log(["Layers:\nName: x, Something: else"])


@pytest.mark.parametrize(("key", "ports"), [("Format/Datatype", "Bindings"), ("Datatype", "I/O Tensors")])
def test_the_inspector_of_both_releases_is_read(key, ports):
    """10.x and 11.x; what differs beyond the datatype's key is not read."""
    word = "Row major Int8 format" if ports == "Bindings" else "Int8"
    report = {
        "Layers": [
            {
                "Name": "a/MatMul_1", "LayerType": "gemm", "Inputs": [{"Name": "q", key: word}],
                "Constants": [{"Name": "w", key: word}], "Outputs": [{"Name": "y", key: "Float"}],
                "Metadata": "[ONNX Layer: a/MatMul]\x1e[ONNX Layer: a/DequantizeLinear]",
            }
        ],
        ports: [],
    }  # fmt: skip
    (only,) = from_inspector(report)
    assert only.is_integer
    assert only.nodes == ("a/MatMul", "a/DequantizeLinear")


def record(kind, tactic, *inputs):
    """A product of TensorRT 10.x, which lists weights, bias, alpha and beta among the inputs and has no constants."""
    return {
        "Name": "a/MatMul_1", "LayerType": kind, "TacticName": tactic, "Outputs": [],
        "Inputs": [{"Name": "t", "Dimensions": list(shape), "Format/Datatype": word} for word, shape in inputs],
        "Metadata": "[ONNX Layer: a/MatMul]\x1e[ONNX Layer: a/Gelu]",
    }  # fmt: skip


ALPHA_BETA = (("Float", ()), ("Float", (1, 1)))
CODES = (("Int8", (8, 256, 72)), ("Int8", (72, 288)))
BIAS = ("Float", (288,))


@pytest.mark.parametrize(
    ("one", "multiplies", "integer"),
    [
        # A product with its activation (NVIDIA/TensorRT issue 4397)
        (record("fusion", "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_by_fusion_tactic", *CODES), True, True),
        (
            record("fusion", "sm80_xmma_gemm_f16f16_f16f32_f16_by_fusion_tactic", ("Half", (8, 72)), CODES[1]),
            True,
            False,
        ),
        (record("fusion", "__myl_CastMulAdd_0x12", ("Int8", (8, 72)), ("Int8", (8, 72))), False, False),
        (record("gemm", "", *CODES, *ALPHA_BETA), True, True),
        (record("gemm", "", *CODES, BIAS, *ALPHA_BETA), True, True),
        (record("gemm", "", CODES[0], *ALPHA_BETA), True, True),
        (record("gemm", "", ("Half", (8, 72)), CODES[1], *ALPHA_BETA), True, False),
        (record("gemm", "", CODES[0], ("Half", (72, 288)), *ALPHA_BETA), True, False),
        # the kernel's name proves it, whatever is listed
        (record("runtime_fusion", "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n", ("Half", (8, 72))), True, True),
        (record("gemm", "sm89_xmma_gemm_f16i8_f16f32_f32", CODES[0], BIAS), True, False),
    ],
)
def test_records_of_tensorrt_10_are_understood(one, multiplies, integer):
    (only,) = from_inspector({"Layers": [one]})
    assert (only.multiplies, only.is_integer) == (multiplies, integer)
    assert only.nodes == ("a/MatMul", "a/Gelu")


@pytest.mark.parametrize("report", [{}, {"Layers": []}, {"Layers": ["a/MatMul", "b/MatMul"]}])
def test_an_engine_without_details_proves_nothing(report):
    with pytest.raises(BackendError, match="no details"):
        from_inspector(report)


@pytest.mark.parametrize(
    ("one", "integer"),
    [
        (layer(), True),
        (layer(constants=("Int8", "Float", "Float")), True),
        (layer(inputs=("Int8", "Int8"), constants=("Float", "Float")), True),  # both operands computed
        (layer(inputs=("Int8",), constants=()), True),  # an inspector that lists no constants
        (layer(inputs=("Half",), constants=("Int8",)), False),  # weights alone
        (layer(inputs=("Int8",), constants=("Half",)), False),  # activations alone
        (layer(inputs=("Half", "Int8", "Int8")), False),  # product in float with integers on the way
        (layer("runtime_fusion"), False),  # may turn its integers into floats first
        (layer("kgen", ("Int8",) * 3, (), name="_gemm_mha_v2"), True),
        (layer("kgen", ("Half",) * 3, (), name="_gemm_mha_v2"), False),
        (layer("kgen", ("Int8", "Int8", "Half"), (), name="_gemm_mha_v2"), False),
        (layer("kgen", ("Int8", "Int8"), (), name="__myl_CastMul"), False),  # pointwise
        (layer("CaskGemmMatrixMultiply", ("Int8",), ("Int8",)), True),
    ],
)
def test_a_product_is_integer_only_where_both_operands_are(one, integer):
    assert one.is_integer is integer


@pytest.mark.parametrize("word", ["FP8", "Row major FP8 format", "E4M3 Float8"])
def test_a_product_of_fp8_is_one_of_two_fp8_operands(word):
    both, one = ([(word, (8, 72)), (other, (72, 288))] for other in (word, "Int8"))
    for operands, expected in ((both, (True, False)), (one, (False, False)), (CODES, (False, True))):
        (only,) = from_inspector({"Layers": [record("gemm", "", *operands, *ALPHA_BETA)]})
        assert (only.multiplies_in("FP8"), only.is_integer) == expected


def card(**products):
    return QuantizationCard(8, 8, (), "simulated", products, SamplingSpec())


def scopes(*names):
    """Nodes MODULE/MatMul of the modules that they are named after."""
    return Scopes(
        SimpleNamespace(name=name, output=[], metadata_props={SCOPE_KEY: name.partition("/")[0]}) for name in names
    )


def test_a_product_counts_by_all_of_its_nodes():
    """Two regions are two nodes; one in float, or one that no layer names, makes the product a fallback."""
    names = ["a/MatMul", "a/MatMul_2"]
    both, one = [layer(nodes=("a/MatMul",)), layer(nodes=("a/MatMul_2",))], [layer(nodes=("a/MatMul",))]
    half = layer("runtime_fusion", ("Half",), ("Int8",), ("a/MatMul_2",))
    assert audit_layers(both, card(a="integer"), scopes(*names), names).fallen_back == ()
    assert audit_layers([*one, half], card(a="integer"), scopes(*names), names).fallen_back == ("a",)
    assert audit_layers(one, card(a="integer"), scopes(*names), names).fallen_back == ("a",)


def test_merged_layers_count_for_every_node_in_them():
    merged = layer(nodes=("q/MatMul", "k/MatMul", "v/MatMul", "v/Add"))
    names = ["q/MatMul", "k/MatMul", "v/MatMul"]
    audit = audit_layers([merged], card(q="integer", k="integer", v="integer"), scopes(*names), names)
    assert (audit.integer, audit.fallen_back) == (3, ())


def test_an_fp8_build_counts_no_int8_product():
    layers = [layer(nodes=("a/MatMul",)), layer(inputs=("FP8",), constants=("FP8",), nodes=("b/MatMul",))]
    names = ["a/MatMul", "b/MatMul"]
    found = audit_layers(layers, card(a="integer", b="integer"), scopes(*names), names, "fp8")
    assert (found.integer, found.fallen_back) == (1, ("a",))
    assert "1 fp8" in found.line


def test_float_graphs_have_no_audit():
    assert audit_layers([layer()], None, scopes(), []) is None
