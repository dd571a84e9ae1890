"""Every number with its noise: a value, an interval, how many samples, and how the interval was found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 200
Z = 1.96  # of a 95 % interval

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Measure:
    """A number with its 95 % interval. None: not finite, as the PSNR of two equal images."""

    value: float | None
    low: float | None
    high: float | None
    count: int  # of samples
    interval: str  # how it was found
    standard_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.value is None:
            return "infinite"
        if self.low is None or self.high is None:
            return number(self.value)
        return f"{number(self.value)} ({number(self.low)} to {number(self.high)})"


def number(value: float) -> str:
    """Three to four significant digits."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e3 else f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4g}"


def resample(statistic: Callable[[Indices], float], count: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """`statistic` of `resamples` draws with replacement of the indices 0..count-1: (resamples,)."""
    rng = np.random.default_rng([seed, count])
    return np.array([statistic(rng.integers(0, count, count)) for _ in range(resamples)], dtype=np.float64)


def around(statistic: Callable[[Indices], float], count: int, resamples: int = RESAMPLES, seed: int = 0) -> Measure:
    """Value +- 1.96 bootstrap standard errors, cut off at zero: for distances, which resampling biases upwards.

    The interval says how far the value moves with other samples of the same number. The bias that a Frechet distance
    has at this number is not in it: compare only values at equal counts.
    """
    value = statistic(np.arange(count))
    error = float(resample(statistic, count, resamples, seed).std(ddof=1)) if resamples > 1 else None
    if error is None:
        return Measure(value, None, None, count, "none")
    return Measure(
        value, max(0.0, value - Z * error), value + Z * error, count,
        f"1.96 standard errors of {resamples} bootstrap resamples", error,
    )  # fmt: skip


def of_mean(values: NDArray[np.floating], resamples: int = 2000, seed: int = 0) -> Measure:
    """Mean of one number per image (N,), with the percentile bootstrap."""
    x = np.asarray(values, np.float64)
    rng = np.random.default_rng([seed, len(x)])
    means = np.array([x[rng.integers(0, len(x), len(x))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Measure(
        float(x.mean()), float(low), float(high), len(x), f"{resamples} bootstrap resamples over images",
        float(means.std(ddof=1)),
    )  # fmt: skip


def of_share(hits: NDArray[np.bool_]) -> Measure:
    """Share of hits (N,) with its Wilson score interval."""
    n, p = len(hits), float(hits.mean())
    spread = Z * Z / n
    half = Z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    low, high = ((p + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))
    return Measure(p, low, high, n, "Wilson score", math.sqrt(p * (1 - p) / n))
