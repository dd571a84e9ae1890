"""Element types of scales that do not go together."""

import numpy as np
import pytest
from onnx import numpy_helper

from lint_graphs import QUANTIZED, found, graph, only


def halves(*names):
    return tuple(numpy_helper.from_array(np.array(0.01, np.float16), name) for name in names)


def model(body, half, **options):
    """The scales named in `half` in float16, the others in float32."""
    floats = [f"float {name} = {{0.01}}" for name in ("s", "ws") if name not in half]
    built = graph(body, ", ".join(["int8 zero = {0}", *floats]), **options)
    built.graph.initializer.extend(halves(*half))
    return built


def test_operands_of_one_product_need_one_type():
    finding = only(model(QUANTIZED, ["ws"]))
    assert (finding.rule, finding.node) == ("scale-type", "product")
    assert "a float scale (dq) and a float16 scale (weight)" in finding.message


def test_a_cast_between_does_not_hide_the_types():
    body = QUANTIZED.replace("[product] y = MatMul(b, c)", "d = Cast<to = 1>(c) [product] y = MatMul(b, d)")
    assert found(model(body, ["ws"])) == [("scale-type", "product")]


def test_a_scale_needs_the_type_of_what_it_quantizes():
    assert found(model(QUANTIZED, ["s", "ws"])) == [("scale-type", "q")]


def test_one_type_throughout_passes():
    assert found(model(QUANTIZED, ["s", "ws"], inputs="float16[2, 64] x", outputs="float16[2, 32] y")) == []


@pytest.mark.parametrize(("start", "expected"), [("h = Cast<to = 10>(x)", [("scale-type", "q")]), ("h = Relu(x)", [])])
def test_types_are_followed_through_operators(start, expected):
    body = start + " n = LayerNormalization(h, g) g2 = Gelu(n)" + QUANTIZED.replace("(x, s", "(g2, s")
    assert found(model(body.replace(", g)", ", h)"), [])) == expected
