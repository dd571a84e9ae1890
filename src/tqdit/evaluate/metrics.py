"""Inception Score, precision and recall as the ADM evaluator defines them (guided-diffusion, evaluations/evaluator.py).

FID is the Frechet distance of pooled features, sFID that of spatial ones (statistics.py); extractors.py says which.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import UsageError

Float64 = NDArray[np.float64]
SPLIT = 5000  # samples of one Inception Score; the score is the mean over the parts, the last of which may be smaller
NEIGHBOURS = 3
ROWS = 1024  # of a block of distances


def inception_score(probabilities: NDArray[np.floating], split: int = SPLIT) -> float:
    """exp E KL(p(y | x) || p(y)), the mean over parts of `split` samples (Salimans et al., arXiv 1606.03498).

    probabilities (N, K) of the classes. Between 1 and K; 0 log 0 is 0.
    """
    p = np.asarray(probabilities, np.float64)
    if not len(p):
        raise UsageError("an Inception Score needs at least one sample.")
    return float(np.mean([_score(p[start : start + split]) for start in range(0, len(p), split)]))


def _score(p: Float64) -> float:
    marginal = p.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(marginal)), 0.0)
    return float(np.exp(terms.sum(axis=1).mean()))


def in_manifold(
    points: NDArray[np.floating], others: NDArray[np.floating], neighbours: int = NEIGHBOURS
) -> NDArray[np.bool_]:
    """Which points (M, D) lie in the manifold of others (N, D): (M,).

    The manifold is the union of balls around the others, each reaching to the k-th nearest neighbour within them.
    Improved precision (Kynkaanniemi et al., arXiv 1904.06991) is the share of samples in the manifold of the reference,
    recall the reverse. Distances are in float64; ADM's evaluator takes float16 if it does not overflow, so its third
    digit may differ.
    """
    if len(others) <= neighbours:
        raise UsageError(
            f"precision and recall need more than {neighbours} points on each side, found {len(others)}. Pass more."
        )
    centre = np.asarray(others, np.float64).mean(axis=0)  # distances of close points far from zero would cancel
    a, b = points - centre, others - centre
    radius = radii(b, neighbours)
    blocks = (a[start : start + ROWS] for start in range(0, len(a), ROWS))
    return np.concatenate([(squared_distances(block, b) <= radius).any(axis=1) for block in blocks])


def radii(points: Float64, neighbours: int) -> Float64:
    """Squared distance of each point (N, D) to its k-th nearest other point: (N,)."""
    found = [
        np.partition(squared_distances(points[start : start + ROWS], points), neighbours, axis=1)[:, neighbours]
        for start in range(0, len(points), ROWS)
    ]  # the nearest one is the point itself
    return np.concatenate(found)


def squared_distances(a: Float64, b: Float64) -> Float64:
    """(N, M) between points (N, D) and (M, D); 0 for values that are only rounding error, as of equal points."""
    norms = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)[None]
    distances = norms - 2 * (a @ b.T)
    result: Float64 = np.where(distances < 1e-12 * norms, 0.0, distances)
    return result
