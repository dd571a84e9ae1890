"""Numbers that no scale can be."""

import numpy as np
import pytest
from onnx import numpy_helper

from lint_graphs import QUANTIZED, found, graph, only
from tqdit.lint import lint

BODY = QUANTIZED.replace("(w, ws)", "<axis = 1>(w, scales)")


def with_scale(number, dtype=np.float32):
    """The clean graph, with one scale of 32 replaced."""
    scales = np.full(32, 0.01, dtype)
    scales[5] = number
    model = graph(BODY)
    model.graph.initializer.append(numpy_helper.from_array(scales, "scales"))
    return model


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (0.0, "is zero at index 5 (0)"),
        (-0.5, "is negative at index 5 (-0.5)"),
        (np.nan, "is not finite at index 5 (nan)"),
        (np.inf, "is not finite at index 5 (inf)"),
        (2.0**-127, "is denormal in float at index 5 (5.87747e-39)"),
    ],
)
def test_an_impossible_scale_is_an_error_that_shows_the_number(number, what):
    finding = only(with_scale(number))
    assert (finding.rule, finding.severity, finding.node) == ("scale-value", "error", "weight")
    assert what in finding.message


def test_the_smallest_normal_scale_passes():
    assert found(with_scale(2.0**-126)) == []


@pytest.mark.parametrize(("number", "wrong"), [(2.0**-15, True), (2.0**-14, False)])
def test_denormals_are_those_of_the_scales_own_type(number, wrong):
    findings = lint(with_scale(number, np.float16))
    assert any("denormal in float16" in finding.message for finding in findings) == wrong


def test_a_scale_that_a_cast_takes_to_zero_is_zero():
    body = "h = Cast<to = 10>(tiny) r = Cast<to = 1>(h)" + QUANTIZED.replace("x, s", "x, r").replace("a, s", "a, r")
    constants = "int8 zero = {0}, float ws = {0.01}, float tiny = {0.00000001}"
    assert found(graph(body, constants)) == [("scale-value", "q"), ("scale-value", "dq")]


@pytest.mark.parametrize(
    "chain",
    [
        "r = Sub(tiny, tiny)",
        "n = Constant<value_ints = [1, 1]>() h = Reshape(tiny, n) r = Squeeze(h)",
        "n = Constant<value_ints = [0]>() h = Unsqueeze(tiny, n) i = Transpose(h) z = Mul(i, i) r = Mul(z, z)",
    ],
)
def test_numbers_are_followed_through_operators(chain):
    body = chain + QUANTIZED.replace("x, s", "x, r").replace("a, s", "a, r")
    constants = "int8 zero = {0}, float ws = {0.01}, float tiny = {0.0}"
    assert found(graph(body, constants)) == [("scale-value", "q"), ("scale-value", "dq")]


def test_a_constant_too_large_to_hold_is_not_computed():
    """Each operand is small, their sum would take 16 GB."""
    wide = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in
            (("row", (1, 65536)), ("column", (65536, 1)))]  # fmt: skip
    model = graph("big = Add(row, column)" + QUANTIZED)
    model.graph.initializer.extend(wide)
    assert found(model) == []


def test_a_scale_beside_the_file_is_read_from_its_folder_only(tmp_path):
    import onnx

    model = with_scale(0.0)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    bare = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    assert lint(bare) == ()
    assert [finding.rule for finding in lint(bare, folder=tmp_path)] == ["scale-value"]
    (tmp_path / "m.data").unlink()
    assert lint(bare, folder=tmp_path) == ()
