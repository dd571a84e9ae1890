"""Local functions that do not survive inlining."""

from lint_graphs import FUNCTION, found, graph, only

SAME = {"outputs": "float[2, 64] y"}
OUTER = """<domain: "tqdit", opset_import: ["" : 20, "tqdit" : 1]> outer <k> (a) => (b) {
  b = tqdit.inner<factor: float = @k>(a)
}
<domain: "tqdit", opset_import: ["" : 20]> inner <factor> (a) => (b) {
  c = Constant<value_float: float = @factor>() b = Mul(a, c)
}"""
TWO_INPUTS = '<domain: "tqdit", opset_import: ["" : 20]> limit (a, high) => (b) { b = Clip(a, "", high) }'


def called(function, call="y = tqdit.twice(x)", **options):
    return graph("[call] " + call, functions=function, **SAME, **options)


def test_one_function_of_standard_operators_passes_where_functions_exist():
    for backend in ("onnxruntime", "tensorrt-rtx", "tensorrt"):
        assert found(called(FUNCTION), backend) == []


def test_openvino_takes_no_functions():
    finding = only(called(FUNCTION), "openvino")
    assert (finding.severity, finding.node) == ("warning", "call")
    assert "onnx.inliner.inline_local_functions" in finding.remedy


def test_a_function_that_nobody_calls_is_none_for_openvino():
    assert found(graph("y = Relu(x)", functions=FUNCTION, **SAME)) == []


def test_a_function_that_calls_a_function_is_an_error():
    finding = only(called(OUTER, "y = tqdit.outer<k = 2.0>(x)"), "tensorrt-rtx")
    assert (finding.rule, finding.severity, finding.node) == ("function", "error", "function tqdit.outer")
    assert "passes an attribute on to it" in finding.message


def test_two_functions_side_by_side_pass():
    both = FUNCTION + FUNCTION.replace("twice", "doubled")
    assert found(called(both, "h = tqdit.twice(x) y = tqdit.doubled(h)"), "tensorrt-rtx") == []


def test_functions_that_call_each_other_for_ever_are_reported_and_end():
    loop = OUTER.replace("Mul(a, c)", "tqdit.outer<k = 1.0>(a)")
    findings = found(called(loop, "y = tqdit.outer<k = 2.0>(x)"), "tensorrt-rtx")
    assert findings == [("function", "function tqdit.outer"), ("function", "function tqdit.inner")]


def test_every_input_of_a_function_has_to_be_passed():
    for call in ('y = tqdit.limit(x, "")', "y = tqdit.limit(x)"):
        finding = only(called(TWO_INPUTS, call), "tensorrt-rtx")
        assert (finding.severity, finding.node) == ("error", "call")
        assert "without its input 'high'" in finding.message


def test_an_input_that_a_standard_operator_in_a_body_leaves_out_passes():
    assert found(called(TWO_INPUTS, "k = Constant<value_float = 1.0>() y = tqdit.limit(x, k)"), "tensorrt-rtx") == []


def test_a_function_named_like_a_standard_operator_is_an_error():
    finding = only(called(FUNCTION.replace("twice", "Relu"), "y = tqdit.Relu(x)"), "tensorrt-rtx")
    assert finding.node == "function tqdit.Relu"
    assert "name of the standard operator Relu" in finding.message


def test_a_function_for_another_opset_is_a_warning():
    finding = only(called(FUNCTION.replace(": 20", ": 21")), "tensorrt-rtx")
    assert (finding.severity, finding.node) == ("warning", "function tqdit.twice")
    assert "version 21 of 'ai.onnx', the model for 20" in finding.message


def test_a_rule_sees_a_function_once_however_often_it_is_called():
    function = FUNCTION.replace("[add] b = Add(a, a)", "k = Constant<value_float = 0.0>() [q] b = QuantizeLinear(a, k)")
    model = called(
        function,
        "h = tqdit.twice(x) y = tqdit.twice(x)",
    )
    assert found(model, "onnxruntime") == [("scale-value", "twice/q")]


def test_a_function_for_another_opset_is_still_looked_into():
    function = FUNCTION.replace("[add] b = Add(a, a)", "k = Constant<value_float = 0.0>() [q] b = QuantizeLinear(a, k)")
    model = called(function.replace(": 20", ": 21"))
    assert sorted(found(model, "onnxruntime")) == [("function", "function tqdit.twice"), ("scale-value", "twice/q")]


def test_a_call_with_more_inputs_than_the_function_has_leaves_the_other_findings():
    body = "h = tqdit.twice(x, x) k = Constant<value_float = 0.0>() [q] y = QuantizeLinear(h, k)"
    assert ("scale-value", "q") in found(graph(body, functions=FUNCTION, **SAME), "onnxruntime")
