"""Float weights that outlive their quantization."""

import numpy as np
import pytest

from lint_graphs import CONSTANTS, QUANTIZED, found, graph, only, weight

BOTH = QUANTIZED.replace("y = MatMul", "p = MatMul") + "[float] r = MatMul(x, {name}) y = Add(p, r)"
SHAPE = (64, 32)


def twin(name, shape=SHAPE):
    return weight(name, shape, np.float32)


def with_scopes(model, product, other):
    for node in model.graph.node:
        if node.name in ("product", "float"):
            entry = node.metadata_props.add()
            scope = product if node.name == "product" else other
            entry.key, entry.value = "pkg.torch.onnx.name_scopes", f"['', 'blocks.0', '{scope}', 'linear_3']"
    return model


@pytest.mark.parametrize("name", ["blocks.0.fc1.weight", "blocks.0.fc1.weight_float", "blocks.0.fc1.weight.fp32"])
def test_a_float_product_with_the_name_of_a_quantized_weight_is_an_error(name):
    body = BOTH.format(name=f'"{name}"').replace("(w, ws)", '("blocks.0.fc1.weight_int8", ws)')
    finding = only(graph(body, weights=(weight("blocks.0.fc1.weight_int8", SHAPE), twin(name))))
    assert (finding.rule, finding.severity, finding.node) == ("float-twin", "error", "float")
    assert "'blocks.0.fc1.weight_int8' feeds product" in finding.message


def test_a_float_product_of_the_same_module_is_an_error():
    model = graph(BOTH.format(name="val_7"), weights=(weight("w", SHAPE), twin("val_7")))
    assert found(with_scopes(model, "blocks.0.fc1", "blocks.0.fc1")) == [("float-twin", "float")]


def test_a_float_product_of_another_module_passes():
    model = graph(BOTH.format(name="val_7"), weights=(weight("w", SHAPE), twin("val_7")))
    assert found(with_scopes(model, "blocks.0.fc1", "blocks.0.fc2")) == []


def test_one_weight_in_two_quantized_products_passes():
    body = QUANTIZED.replace("y = MatMul", "p = MatMul") + "r = MatMul(b, c) y = Add(p, r)"
    assert found(graph(body)) == []


def test_a_float_weight_that_is_quantized_in_the_graph_is_a_warning():
    body = "[qw] k = QuantizeLinear(f, ws, zero)" + QUANTIZED.replace("(w, ws)", "(k, ws)")
    finding = only(graph(body, weights=(twin("f"),)))
    assert (finding.severity, finding.node) == ("warning", "qw")
    assert "'f', which the file stores in float" in finding.message


def test_a_float_weight_that_is_used_both_ways_is_an_error():
    body = "k = QuantizeLinear(f, ws, zero)" + BOTH.format(name="f").replace("(w, ws)", "(k, ws)")
    assert ("float-twin", "float") in found(graph(body, weights=(twin("f"),)))


def test_a_float_weight_that_nothing_uses_is_a_warning():
    finding = only(graph(QUANTIZED, weights=(weight("w", SHAPE), twin("w_float"))))
    assert (finding.severity, finding.node) == ("warning", "w_float")
    assert found(graph(QUANTIZED, weights=(weight("w", SHAPE), twin("other")))) == []


def test_a_float_product_alone_passes():
    assert found(graph("y = MatMul(x, f)", CONSTANTS, weights=(twin("f"),))) == []
