"""Guidance against its formula."""

import numpy as np
import pytest

import reference
from tqdit.errors import UsageError
from tqdit.sampling.guidance import Guidance, check_scale, rows_per_image

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("channels", "moved"), [(None, 4), (3, 3), (8, 4)])
def test_guidance_moves_its_channels_and_leaves_the_others(channels, moved):
    conditional, unconditional = RNG.standard_normal((2, 2, 8, 2, 2)).astype(np.float32)
    out = np.empty((2, 4, 2, 2), np.float32)
    scale = np.array([4.0, 1.0], np.float32)
    Guidance(1.5, channels).combine(np.concatenate([conditional, unconditional]), scale, out)
    for row in range(2):
        pair = conditional[row : row + 1].astype(np.float64), unconditional[row : row + 1].astype(np.float64)
        expected = reference.guide(*pair, float(scale[row]), moved)[0, :4]
        np.testing.assert_allclose(out[row], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out[:, moved:], conditional[:, moved:4])


@pytest.mark.parametrize("scale", [4.0, 0.25, 1.0, -2.0])
@pytest.mark.parametrize("channels", [None, 3, 8])
def test_an_error_enters_with_the_derivative_of_the_formula(scale, channels):
    guidance = Guidance(1.5, channels)
    outputs, guided = RNG.standard_normal((2, 4, 2)).astype(np.float32), np.empty((3, 4, 2), np.float32)
    errors = np.array([[0, 0], [1, 0], [0, 1]], np.float32)  # none, of the conditional row, of the other
    for error, out in zip(errors, guided, strict=True):
        guidance.combine(outputs + error[:, None, None], np.array([scale], np.float32), out[None])
    expected = np.abs(guided[1:] - guided[0]).mean(-1)
    np.testing.assert_allclose(guidance.weights(scale, 4), expected, atol=1e-5)


def test_an_image_needs_two_rows_with_guidance():
    assert (rows_per_image(None), rows_per_image(Guidance(2.0))) == (1, 2)


def test_the_scale_is_the_default_or_the_users():
    assert check_scale(Guidance(2.5), None) == 2.5
    assert check_scale(Guidance(2.5), 4) == 4.0
    assert check_scale(None, None) == 1.0


@pytest.mark.parametrize(
    ("guidance", "scale", "message"),
    [(Guidance(1.5), float("nan"), "nan; expected a finite number"), (Guidance(1.5), float("-inf"), "-inf"),
     (None, 2.0, "without guidance")],
)  # fmt: skip
def test_an_impossible_scale_is_refused(guidance, scale, message):
    with pytest.raises(UsageError, match=message):
        check_scale(guidance, scale)
