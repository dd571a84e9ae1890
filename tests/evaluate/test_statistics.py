"""Frechet distances with known answers, and statistics that do not depend on how the samples arrive."""

from __future__ import annotations

import numpy as np
import pytest

from tqdit.errors import UsageError
from tqdit.evaluate.statistics import Gaussian, frechet_distance, moments, streamed

RNG = np.random.default_rng(0)


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
    a, b = moments(x).gaussian, moments(x[::-1]).gaussian
    assert frechet_distance(a, b) == pytest.approx(0, abs=1e-10)
    c = moments(RNG.normal(size=(300, 8)) + 1).gaussian
    assert frechet_distance(a, c) == pytest.approx(frechet_distance(c, a), rel=1e-10)


def test_large_samples_of_gaussians_reach_the_closed_form():
    x, y = RNG.normal(size=(40_000, 3)), 2 * RNG.normal(size=(40_000, 3)) + 1
    found = frechet_distance(moments(x).gaussian, moments(y).gaussian)
    assert found == pytest.approx(3 * 1 + 3 * 1, rel=0.02)  # standard errors of 1/sqrt(40,000)


@pytest.mark.parametrize("batch", [1, 7, 64, 511, 512, 513, 1300, 2000])
def test_the_batch_size_changes_no_bit(batch):
    x = np.random.default_rng(3).normal(size=(1300, 6)).astype(np.float32)
    whole = streamed([x])
    parts = streamed(x[start : start + batch] for start in range(0, len(x), batch))
    assert parts.count == 1300
    assert parts.mean.tobytes() == whole.mean.tobytes()
    assert parts.scatter.tobytes() == whole.scatter.tobytes()


def test_streamed_statistics_are_those_of_numpy():
    x = RNG.normal(size=(1300, 6)) + 100
    found = streamed(np.array_split(x, 9)).gaussian
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-12)


def test_shards_merge_to_the_whole():
    x = RNG.normal(size=(900, 5)) * [1, 2, 3, 4, 5] - 7
    merged = moments(x[:100]).merge(moments(x[100:350])).merge(moments(x[350:]))
    np.testing.assert_allclose(merged.gaussian.covariance, np.cov(x, rowvar=False), rtol=1e-9)
    assert merged.count == 900


def test_rank_counts_the_directions_that_vary():
    assert Gaussian(np.zeros(20), covariance(20, rank=6)).rank == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(np.zeros(3), np.eye(4)), "does not fit a covariance"),
        (lambda: Gaussian(np.full(2, np.nan), np.eye(2)), "NaN or infinite"),
        (lambda: moments(np.zeros((1, 3))).gaussian, "have no covariance"),
        (lambda: streamed([]), "there are no samples"),
        (
            lambda: frechet_distance(Gaussian(np.zeros(2), np.eye(2)), Gaussian(np.zeros(3), np.eye(3))),
            "features of size 2 cannot be compared with features of size 3",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
