"""Scales on Q/DQ that are known only while the graph runs."""

import pytest

from lint_graphs import CONSTANTS, QUANTIZED, found, graph, only

WITH_SCALE = QUANTIZED.replace("(x, s, zero)", "(x, r, zero)")


def test_a_clean_int8_graph_has_no_findings():
    assert found(graph(QUANTIZED)) == []


def test_a_scale_that_is_an_input_is_an_error_with_the_ratio_form_as_its_remedy():
    finding = only(graph(WITH_SCALE, inputs="float[2, 64] x, float r"))
    assert (finding.rule, finding.severity, finding.node) == ("runtime-scale", "error", "q")
    assert "'r' is computed at run time" in finding.message
    assert "run the product in float" in finding.message
    assert "x / r[g] -> QuantizeLinear/DequantizeLinear with a constant scale -> MatMul -> * r[g]" in finding.remedy


def test_a_scale_gathered_by_a_run_time_index_is_one():
    body = "r = Gather(table, t)" + WITH_SCALE
    model = graph(body, CONSTANTS + ", float[3] table = {0.1, 0.2, 0.3}", "float[2, 64] x, int64 t")
    assert found(model) == [("runtime-scale", "q")]


def test_a_run_time_scale_on_dequantize_linear_alone_is_one():
    body = QUANTIZED.replace("(a, s, zero)", "(a, r, zero)")
    assert found(graph(body, inputs="float[2, 64] x, float r")) == [("runtime-scale", "dq")]


def test_the_ratio_form_is_none():
    body = "xr = Div(x, r)" + QUANTIZED.replace("(x, s", "(xr, s").replace("y = MatMul", "p = MatMul") + "y = Mul(p, r)"
    assert found(graph(body, inputs="float[2, 64] x, float[2, 1] r")) == []


@pytest.mark.parametrize(
    "chain",
    [
        "r = Identity(s)",
        "h = Cast<to = 10>(s) r = Cast<to = 1>(h)",
        "n = Constant<value_ints = [1]>() r = Reshape(s, n)",
        "two = Constant<value_float = 2.0>() r = Mul(s, two)",
        "n = Constant<value_ints = [0]>() u = Unsqueeze(s, n) r = Squeeze(u)",
        "r = Constant<value_float = 0.5>()",
        "i = Constant<value_int = 0>() t = Constant<value_floats = [0.5, 0.6]>() r = Gather(t, i)",
    ],
)
def test_what_is_computed_from_constants_is_constant(chain):
    assert found(graph(chain + WITH_SCALE)) == []


def test_random_numbers_are_not_constant():
    assert found(graph("r = RandomUniformLike(s)" + WITH_SCALE)) == [("runtime-scale", "q")]


def test_an_initializer_that_an_input_may_override_is_not_constant():
    inputs = "float[2, 64] x, float s"
    assert ("runtime-scale", "q") in found(graph(QUANTIZED, inputs=inputs))
    assert found(graph(QUANTIZED, inputs=inputs + ", float ws, int8 zero, int8[64, 32] w", ir=3)) == []


FAKE = """<domain: "tqdit", opset_import: ["" : 20]> fake {signature} (v{scale}) => (d) {{
  {start} z = Constant<value = int8 {{0}}>() [inner] e = QuantizeLinear(v, k, z) d = DequantizeLinear(e, fixed, z)
}}"""
FIXED = "fixed = Constant<value_float = 0.5>()"


def test_a_scale_that_a_function_takes_is_judged_by_what_its_calls_pass():
    function = FAKE.format(signature="", scale=", k", start=FIXED)
    call = "y = tqdit.fake(x, {})"
    options = {"outputs": "float[2, 64] y", "functions": function}
    assert found(graph(call.format("s"), **options), "onnxruntime") == []
    running = graph(call.format("r"), inputs="float[2, 64] x, float r", **options)
    assert found(running, "onnxruntime") == [("runtime-scale", "fake/inner")]


def test_a_scale_that_is_an_attribute_of_a_function_is_constant():
    function = FAKE.format(signature="<step>", scale="", start=FIXED + "k = Constant<value_float: float = @step>()")
    model = graph("y = tqdit.fake<step = 0.5>(x)", outputs="float[2, 64] y", functions=function)
    assert found(model, "onnxruntime") == []
    zero = graph("y = tqdit.fake<step = 0.0>(x)", outputs="float[2, 64] y", functions=function)
    assert found(zero, "onnxruntime") == [("scale-value", "fake/inner")]


BRANCHES = """
  [choice] y = If(c) <
    then_branch = g1 () => (float[2, 64] t) {{ [inner] q = QuantizeLinear(x, {scale}, zero) t = DequantizeLinear(q, s, zero) }},
    else_branch = g2 () => (float[2, 64] e) {{ e = Identity(x) }}
  >
"""  # noqa: E501


def test_subgraphs_see_the_constants_around_them():
    inputs, outputs = "float[2, 64] x, bool c, float r", "float[2, 64] y"
    assert found(graph(BRANCHES.format(scale="s"), inputs=inputs, outputs=outputs)) == []
    running = graph(BRANCHES.format(scale="r"), inputs=inputs, outputs=outputs)
    assert found(running) == [("runtime-scale", "choice/then_branch/inner")]
