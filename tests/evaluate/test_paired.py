"""Paired metrics and intervals on cases with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tqdit.errors import UsageError
from tqdit.evaluate.bootstrap import Measure, around, balanced_strata, number, of_mean, of_share
from tqdit.evaluate.paired import psnr, relative_errors, ssim

RNG = np.random.default_rng(0)


def pictures(count: int = 6, size: int = 16) -> np.ndarray:
    return RNG.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_the_relative_error_is_per_image():
    a = np.ones((3, 2, 2, 2))
    b = a * np.array([1, 1.5, 0]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(relative_errors(a, b), [0, 0.25, 1])


def test_an_error_where_the_reference_is_zero_is_infinite_and_no_warning():
    assert relative_errors(np.zeros((2, 4)), np.array([[0, 0, 0, 0], [1, 0, 0, 0]])).tolist() == [0, math.inf]


def test_psnr_of_a_constant_difference():
    a = np.full((4, 16, 16, 3), 100, np.uint8)
    found = psnr(a, a + np.uint8(5))
    assert found.value == pytest.approx(20 * math.log10(255 / 5))
    assert found.low == pytest.approx(found.value)


def test_equal_images_have_no_finite_psnr():
    a = pictures()
    assert psnr(a, a).value is None
    assert str(psnr(a, a)) == "infinite"


@pytest.mark.slow
def test_ssim_of_equal_images_is_one_and_of_inverted_ones_negative():
    a = pictures()
    np.testing.assert_allclose(ssim(a, a), 1)
    assert (ssim(a, 255 - a) < -0.5).all()


def test_ssim_of_two_flat_images_is_the_luminance_term():
    a, b = np.full((1, 16, 16, 3), 100, np.uint8), np.full((1, 16, 16, 3), 140, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b)[0] == pytest.approx((2 * 100 * 140 + c1) / (100**2 + 140**2 + c1), rel=1e-12)


def test_ssim_is_the_definition_written_with_loops():
    a, b = pictures(1, 13), pictures(1, 13)
    x = np.arange(11) - 5
    window = np.exp(-(x[:, None] ** 2 + x[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(3):
        for top in range(3):
            for left in range(3):
                p, q = (im[0, top : top + 11, left : left + 11, channel].astype(float) for im in (a, b))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert ssim(a, b)[0] == pytest.approx(np.mean(values), rel=1e-9)


def test_images_smaller_than_the_window_still_have_an_ssim():
    a = pictures(2, 8)
    np.testing.assert_allclose(ssim(a, a), 1)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_images_that_are_no_pairs_are_refused(metric):
    with pytest.raises(UsageError, match="cannot be paired"):
        metric(pictures(4, 16), pictures(4, 8))


@pytest.mark.slow
def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        found = of_mean(rng.normal(3, 1, 60), resamples=200, seed=seed)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 3 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_the_interval_around_a_distance_has_the_width_of_its_spread():
    """The mean as the statistic, whose standard error is known: 1 / sqrt(n)."""
    x = np.random.default_rng(2).normal(10, 1, 400)
    found = around(lambda chosen: float(x[chosen].mean()), 400, resamples=400)
    assert found.value == pytest.approx(x.mean())
    assert found.standard_error == pytest.approx(1 / 20, rel=0.15)
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.standard_error)


def test_a_share_has_its_wilson_interval():
    """8 of 10, by hand from the formula: 0.490 to 0.943."""
    found = of_share(np.array([True] * 8 + [False] * 2))
    assert found.value == 0.8
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_a_measure_prints_its_interval():
    assert str(Measure(0.5, 0.25, 0.75, 9, "x")) == "0.5 (0.25 to 0.75)"
    assert number(0.00012345) == "1.23e-04"
    assert number(12345.6) == "1.235e+04"


def test_classes_that_were_dealt_out_are_resampled_within_themselves():
    """Ten classes far apart, 40 of each: the mean over all moves with the spread within the classes alone."""
    labels = np.arange(400) % 10
    x = 100.0 * labels + np.random.default_rng(4).normal(size=400)
    assert balanced_strata(labels) is labels
    found = around(lambda chosen: float(x[chosen].mean()), 400, resamples=400, strata=balanced_strata(labels))
    assert found.standard_error == pytest.approx(1 / 20, rel=0.15)
    plain = around(lambda chosen: float(x[chosen].mean()), 400, resamples=400)
    assert plain.standard_error > 100 * found.standard_error


@pytest.mark.parametrize("labels", [None, np.array([0, 0, 0, 1]), np.array([0, 1, 2, 3])])
def test_random_or_single_labels_are_no_strata(labels):
    assert balanced_strata(labels) is None
