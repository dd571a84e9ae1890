"""Means and covariances of features, and the Frechet distance between two of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import UsageError

Float64 = NDArray[np.float64]


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

    @classmethod
    def of(cls, features: NDArray[np.floating], weights: Float64 | None = None) -> Gaussian:
        """Of features (N, D) that count `weights` (N,) times, once if None, with the unbiased covariance."""
        count = len(features)
        if count < 2:
            raise UsageError(f"{count} sample(s) have no covariance. Pass at least 2.")
        x = np.asarray(features, np.float64)
        covariance = np.atleast_2d(np.cov(x, rowvar=False, bias=True, aweights=weights))
        return cls(np.average(x, axis=0, weights=weights), covariance * (count / (count - 1)))

    @property
    def rank(self) -> int:
        """Directions in which the features vary at all."""
        return int(np.linalg.matrix_rank(self.covariance, hermitian=True))


def frechet_to(reference: Gaussian) -> Callable[[Gaussian], float]:
    """The Frechet distance to `reference`, |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), as a function.

    Dowson, Landau 1982; Heusel et al., arXiv 1706.08500. tr (S_a S_b)^(1/2) is the sum of the singular values of
    R_a^T R_b, S = R R^T. That needs no square root of a matrix that is not symmetric, and is exact if a covariance is
    singular, so no offset is added anywhere. The root of the reference is found once.
    """
    b, root_b = reference, _root(reference.covariance)

    def distance(a: Gaussian) -> float:
        if a.mean.shape != b.mean.shape:
            raise UsageError(
                f"features of size {len(a.mean)} cannot be compared with features of size {len(b.mean)}. Use one "
                "extractor for both."
            )
        shift = a.mean - b.mean
        common = np.linalg.svd(_root(a.covariance).T @ root_b, compute_uv=False).sum()
        value = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * common
        return max(0.0, float(value))

    return distance


def _root(covariance: Float64) -> Float64:
    """R (D, D) with R R^T = covariance; eigenvalues below zero are rounding."""
    values, vectors = np.linalg.eigh(covariance)
    root: Float64 = vectors * np.sqrt(values.clip(min=0))
    return root
