"""Means and covariances of features, streamed and merged, and the Frechet distance between two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import UsageError

Float64 = NDArray[np.float64]
BLOCK = 512  # rows that are summed at once, however they arrive: batches then cannot change a bit of the result


@dataclass(frozen=True, eq=False)
class Gaussian:
    """mean float64 (D,), covariance float64 (D, D)."""

    mean: Float64
    covariance: Float64

    def __post_init__(self) -> None:
        size = len(self.mean)
        if self.mean.shape != (size,) or self.covariance.shape != (size, size):
            raise UsageError(
                f"a mean of shape {self.mean.shape} does not fit a covariance of shape {self.covariance.shape}; "
                "expected (D,) and (D, D). Compute the statistics again."
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise UsageError("a mean or covariance holds NaN or infinite values. Compute the statistics again.")

    @property
    def rank(self) -> int:
        """Directions in which the features vary at all."""
        return int(np.linalg.matrix_rank(self.covariance, hermitian=True))


@dataclass(frozen=True, eq=False)
class Moments:
    """Of `count` feature vectors: mean (D,) and scatter (D, D) = sum (x - mean)(x - mean)^T, float64."""

    count: int
    mean: Float64
    scatter: Float64

    def merge(self, other: Moments) -> Moments:
        """Of both sets together (Chan, Golub, LeVeque 1979)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def gaussian(self) -> Gaussian:
        """With the unbiased covariance, as np.cov gives it."""
        if self.count < 2:
            raise UsageError(f"{self.count} sample(s) have no covariance. Pass at least 2.")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


def moments(features: NDArray[np.floating]) -> Moments:
    """Of features (N, D), all at once."""
    x = np.asarray(features, np.float64)
    mean = x.mean(axis=0)
    return Moments(len(x), mean, (x - mean).T @ (x - mean))


def weighted(features: NDArray[np.floating], weights: Float64) -> Gaussian:
    """Of features (N, D) that count `weights` (N,) times; with ones that of `moments`."""
    x = np.asarray(features, np.float64)
    share = weights / weights.sum()
    mean = share @ x
    centred = x - mean
    covariance = (centred * share[:, None]).T @ centred * (len(x) / (len(x) - 1))
    return Gaussian(mean, covariance)


class Accumulator:
    """Moments of a stream of batches (N, D), whatever their sizes."""

    def __init__(self) -> None:
        self._waiting: list[NDArray[np.floating]] = []
        self._total: Moments | None = None

    def add(self, batch: NDArray[np.floating]) -> None:
        self._waiting.append(np.asarray(batch))
        if sum(map(len, self._waiting)) >= BLOCK:
            rows = np.concatenate(self._waiting)
            whole = len(rows) - len(rows) % BLOCK
            for start in range(0, whole, BLOCK):
                self._merge(rows[start : start + BLOCK])
            self._waiting = [rows[whole:]]

    def result(self) -> Moments:
        """Of all batches so far."""
        rest = [batch for batch in self._waiting if len(batch)]
        if rest:
            self._merge(np.concatenate(rest))
            self._waiting = []
        if self._total is None:
            raise UsageError("there are no samples. Pass at least one.")
        return self._total

    def _merge(self, rows: NDArray[np.floating]) -> None:
        found = moments(rows)
        self._total = found if self._total is None else self._total.merge(found)


def streamed(batches: Iterable[NDArray[np.floating]]) -> Moments:
    """Moments of all batches together."""
    accumulator = Accumulator()
    for batch in batches:
        accumulator.add(batch)
    return accumulator.result()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Dowson, Landau 1982; Heusel et al., arXiv 1706.08500).

    tr (S_a S_b)^(1/2) is the sum of the singular values of R_a^T R_b, S = R R^T. That needs no square root of a matrix
    that is not symmetric, and is exact if a covariance is singular, so no offset is added anywhere.
    """
    return frechet_to(b)(a)


def frechet_to(reference: Gaussian) -> Callable[[Gaussian], float]:
    """`frechet_distance` to one reference, whose root is found once."""
    root = _root(reference.covariance)
    return lambda found: _frechet(found, reference, root)


def _frechet(a: Gaussian, b: Gaussian, root_b: Float64) -> float:
    if a.mean.shape != b.mean.shape:
        raise UsageError(
            f"features of size {len(a.mean)} cannot be compared with features of size {len(b.mean)}. Use one extractor "
            "for both."
        )
    shift = a.mean - b.mean
    common = np.linalg.svd(_root(a.covariance).T @ root_b, compute_uv=False).sum()
    value = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * common
    return max(0.0, float(value))


def _root(covariance: Float64) -> Float64:
    """R (D, D) with R R^T = covariance; eigenvalues below zero are rounding."""
    values, vectors = np.linalg.eigh(covariance)
    root: Float64 = vectors * np.sqrt(values.clip(min=0))
    return root
