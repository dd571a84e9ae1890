"""Inception Score, precision and recall on cases with known answers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tqdit.errors import UsageError
from tqdit.evaluate import metrics
from tqdit.evaluate.metrics import in_manifold, inception_score

RNG = np.random.default_rng(0)


def precision_recall(reference: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    return float(in_manifold(samples, reference).mean()), float(in_manifold(reference, samples).mean())


def test_certain_and_balanced_predictions_score_the_number_of_classes():
    assert inception_score(np.eye(10)[np.arange(200) % 10]) == pytest.approx(10, rel=1e-12)


def test_predictions_that_never_change_score_one():
    assert inception_score(np.tile([0.7, 0.2, 0.1], (50, 1))) == pytest.approx(1, rel=1e-12)


def test_a_half_certain_case_by_hand():
    """Two kinds of rows (1, 0) and (1/2, 1/2): p(y) = (3/4, 1/4)."""
    kl = (math.log(4 / 3) + (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))) / 2
    assert inception_score(np.array([[1.0, 0.0], [0.5, 0.5]] * 8)) == pytest.approx(math.exp(kl), rel=1e-12)


def test_the_score_is_the_mean_over_parts_of_5000_and_a_rest():
    """One part that is balanced, and a rest of one class: (2 + 1) / 2, where the whole would give another number."""
    p = np.eye(2)[np.concatenate([np.arange(5000) % 2, np.zeros(100, int)])]
    assert inception_score(p) == pytest.approx(1.5, rel=1e-12)
    assert inception_score(p, split=10_000) != pytest.approx(1.5, rel=1e-3)


def test_identical_sets_have_precision_and_recall_one():
    x = RNG.normal(size=(60, 8))
    assert precision_recall(x, x.copy()) == (1, 1)


def test_distant_sets_have_precision_and_recall_zero():
    x = RNG.normal(size=(60, 8))
    assert precision_recall(x, x + 1000) == (0, 0)


def test_samples_of_one_mode_of_two_are_precise_and_recall_half():
    """Reference: two clusters of 30; samples: the first cluster alone."""
    near, far = RNG.normal(size=(30, 4)), RNG.normal(size=(30, 4)) + 500
    precision, recall = precision_recall(np.concatenate([near, far]), near)
    assert (precision, recall) == (1, 0.5)
    assert precision_recall(near, np.concatenate([near, far])) == (0.5, 1)  # the roles change places


def test_a_line_by_hand():
    """Points 0 to 4: third nearest neighbours at 3, 2, 2, 2, 3. Sample 6.5 is within 3 of 4, 7.5 is not."""
    line = np.arange(5.0)[:, None]
    assert metrics.radii(line, 3).tolist() == [9, 4, 4, 4, 9]
    samples = np.array([6.5, 7.5, 100, 200, 300])[:, None]
    precision, recall = precision_recall(line, samples)
    assert precision == pytest.approx(1 / 5)
    # radii of the samples: 193.5, 192.5, 93.5, 193.5, 293.5; the first reaches the whole line
    assert recall == 1


def brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    """The definition with loops."""

    def reach(points: np.ndarray) -> list[float]:
        return [sorted(math.dist(a, b) for j, b in enumerate(points) if j != i)[k - 1] for i, a in enumerate(points)]

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        radius = reach(centres)
        return float(np.mean([any(math.dist(p, c) <= r for c, r in zip(centres, radius, strict=True)) for p in points]))

    return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize("seed", range(3))
def test_it_agrees_with_the_definition_in_loops(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(40, 3)), rng.normal(size=(35, 3)) * 0.8 + 0.7
    assert precision_recall(a, b) == pytest.approx(brute_force(a, b, 3))
    assert 0 < precision_recall(a, b)[0] < 1


def test_the_block_size_changes_nothing(monkeypatch):
    a, b = RNG.normal(size=(70, 5)), RNG.normal(size=(50, 5)) + 0.5
    found = []
    for rows in (1, 7, 64, 1024):
        monkeypatch.setattr(metrics, "ROWS", rows)
        found.append(precision_recall(a, b))
    assert all(one == other for one, other in itertools.pairwise(found))


def test_points_far_from_zero_keep_their_distances():
    a, b = RNG.normal(size=(40, 3)), RNG.normal(size=(40, 3))
    assert precision_recall(a + 1e6, b + 1e6) == precision_recall(a, b)


@pytest.mark.parametrize(("n", "m"), [(3, 9), (9, 3)])
def test_too_few_points_are_refused(n, m):
    with pytest.raises(UsageError, match="need more than 3 points on each side, found 3"):
        precision_recall(np.zeros((n, 2)), np.zeros((m, 2)))


def test_no_sample_has_no_score():
    with pytest.raises(UsageError, match="at least one sample"):
        inception_score(np.zeros((0, 4)))
