"""Frechet distances with known answers, and statistics of weighted samples."""

from __future__ import annotations

import numpy as np
import pytest

from tqdit.errors import UsageError
from tqdit.evaluate.statistics import Gaussian, frechet_to

RNG = np.random.default_rng(0)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    return frechet_to(b)(a)


def covariance(size: int, rank: int | None = None, seed: int = 0) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(size, rank or size))
    return root @ root.T / size


def denman_beavers(matrix: np.ndarray) -> np.ndarray:
    """The square root of a matrix without eigenvalues <= 0, by an iteration that shares nothing with ours."""
    y, z = matrix, np.eye(len(matrix))
    for _ in range(60):
        y, z = (y + np.linalg.inv(z)) / 2, (z + np.linalg.inv(y)) / 2
    return y


def test_one_dimension_is_the_textbook_formula():
    a, b = Gaussian(np.array([1.0]), np.array([[4.0]])), Gaussian(np.array([-2.0]), np.array([[25.0]]))
    assert frechet_distance(a, b) == pytest.approx(3**2 + (2 - 5) ** 2, rel=1e-12)


def test_diagonal_covariances_add_up_over_the_axes():
    variances, other = np.array([1.0, 4.0, 0.25, 9.0]), np.array([4.0, 4.0, 1.0, 0.0])
    shift = np.array([0.5, 0.0, -1.0, 2.0])
    expected = np.square(shift).sum() + np.square(np.sqrt(variances) - np.sqrt(other)).sum()
    a, b = Gaussian(np.zeros(4), np.diag(variances)), Gaussian(shift, np.diag(other))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_a_scaled_covariance_has_a_closed_form():
    """S_b = c^2 S_a: tr S_a (1 - c)^2."""
    s = covariance(12)
    a, b = Gaussian(np.zeros(12), s), Gaussian(np.zeros(12), 2.25 * s)
    assert frechet_distance(a, b) == pytest.approx(0.25 * np.trace(s), rel=1e-10)


def test_it_agrees_with_an_independent_square_root():
    s, t = covariance(16, seed=1) + 0.1 * np.eye(16), covariance(16, seed=2) + 0.1 * np.eye(16)
    root = denman_beavers(s @ t)
    np.testing.assert_allclose(root @ root, s @ t, rtol=1e-9, atol=1e-9)
    expected = np.trace(s) + np.trace(t) - 2 * np.trace(root)
    assert frechet_distance(Gaussian(np.zeros(16), s), Gaussian(np.zeros(16), t)) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances_need_no_offset():
    """Fewer samples than features, as with 16 images: the common directions alone count."""
    s = covariance(40, rank=5)
    a = Gaussian(np.zeros(40), s)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, Gaussian(np.zeros(40), np.zeros((40, 40)))) == pytest.approx(np.trace(s), rel=1e-10)


def test_identical_sets_are_at_distance_zero_and_order_does_not_matter():
    x = RNG.normal(size=(300, 8))
    a, b = Gaussian.of(x), Gaussian.of(x[::-1])
    assert frechet_distance(a, b) == pytest.approx(0, abs=1e-10)
    c = Gaussian.of(RNG.normal(size=(300, 8)) + 1)
    assert frechet_distance(a, c) == pytest.approx(frechet_distance(c, a), rel=1e-10)


def test_large_samples_of_gaussians_reach_the_closed_form():
    x, y = RNG.normal(size=(40_000, 3)), 2 * RNG.normal(size=(40_000, 3)) + 1
    found = frechet_distance(Gaussian.of(x), Gaussian.of(y))
    assert found == pytest.approx(3 * 1 + 3 * 1, rel=0.02)  # standard errors of 1/sqrt(40,000)


def test_statistics_are_those_of_numpy():
    x = RNG.normal(size=(1300, 6)) + 100
    found = Gaussian.of(x.astype(np.float32))
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-4, atol=1e-6)
    assert Gaussian.of(x[:, :1]).covariance.shape == (1, 1)


def test_whole_weights_repeat_samples():
    """The covariance keeps its factor n / (n - 1) of the samples, however they are weighted."""
    x = RNG.normal(size=(90, 4)) * [1, 2, 3, 4]
    weights = RNG.integers(0, 3, 90).astype(float)
    repeated = np.repeat(x, weights.astype(int), axis=0)
    found = Gaussian.of(x, weights)
    np.testing.assert_allclose(found.mean, repeated.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(found.covariance, np.cov(repeated, rowvar=False, bias=True) * 90 / 89, rtol=1e-9)


def test_rank_counts_the_directions_that_vary():
    assert Gaussian(np.zeros(20), covariance(20, rank=6)).rank == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(np.zeros(3), np.eye(4)), "does not fit a covariance"),
        (lambda: Gaussian(np.full(2, np.nan), np.eye(2)), "NaN or infinite"),
        (lambda: Gaussian.of(np.zeros((1, 3))), "have no covariance"),
        (
            lambda: frechet_distance(Gaussian(np.zeros(2), np.eye(2)), Gaussian(np.zeros(3), np.eye(3))),
            "features of size 2 cannot be compared with features of size 3",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
