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


def resample(
    statistic: Callable[[Indices], float],
    count: int,
    resamples: int,
    seed: int,
    strata: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """`statistic` of `resamples` draws with replacement of the indices 0..count-1: (resamples,).

    strata (count,): draws stay within each stratum, for example if all classes have equal numbers of samples.
    """
    rng = np.random.default_rng([seed, count])
    groups = [np.arange(count)] if strata is None else [np.flatnonzero(strata == one) for one in np.unique(strata)]
    return np.array(
        [
            statistic(np.concatenate([members[rng.integers(0, len(members), len(members))] for members in groups]))
            for _ in range(resamples)
        ],
        dtype=np.float64,
    )


def balanced_strata(labels: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
    """The labels if all classes have the same number of samples to within one, and at least two; otherwise None.

    A distance between sets whose classes are balanced moves less from seed to seed than one between sets with random
    classes, and a bootstrap that ignored it would say several times too much.
    """
    if labels is None or not len(labels):
        return None
    counts = np.unique(labels, return_counts=True)[1]
    return labels if counts.min() >= 2 and counts.max() - counts.min() <= 1 else None


def around(
    statistic: Callable[[Indices], float], count: int, resamples: int = RESAMPLES, seed: int = 0,
    strata: NDArray[np.int64] | None = None,
) -> Measure:  # fmt: skip
    """Value +- 1.96 bootstrap standard errors, cut off at zero: for distances, which resampling biases upwards.

    The interval says how far the value moves with other samples of the same number. The bias that a Frechet distance
    has at this number is not in it: compare only values at equal counts. Within strata of m samples a bootstrap sees
    (m - 1) / m of the variance, which is put right.
    """
    value = statistic(np.arange(count))
    error = float(resample(statistic, count, resamples, seed, strata).std(ddof=1))
    how = f"1.96 standard errors of {resamples} bootstrap resamples"
    if strata is not None:
        members = count / len(np.unique(strata))
        error *= math.sqrt(members / (members - 1))
        how += " within classes"
    return Measure(value, max(0.0, value - Z * error), value + Z * error, count, how, error)


def jackknife(
    statistic: Callable[[NDArray[np.float64]], float], count: int, blocks: int = RESAMPLES,
    labels: NDArray[np.int64] | None = None, least: float = 0.0,
) -> Measure:  # fmt: skip
    """Value +- 1.96 jackknife standard errors, for Frechet distances. `statistic` takes a weight per sample (count,).

    Samples are left out in about `blocks` blocks; if classes are balanced, the others of a class take over its
    weight. A bootstrap sees 2 to 2.6 times the real spread of a distance that is near its bias, since resampling adds
    the noise that the distance measures once more; the jackknife sees 1.4 to 1.6 times (scripts/interval_check.py).
    """
    strata = balanced_strata(labels)
    classes = [] if strata is None else [np.flatnonzero(strata == one) for one in np.unique(strata)]
    by_class = 0 < 2 * len(classes) <= blocks
    by_label = np.arange(count) if labels is None else np.argsort(labels, kind="stable")  # for fair shares of classes
    groups = classes if by_class else [by_label]
    variance = 0.0
    for members in groups:
        size = len(members)
        parts = max(2, min(size, round(blocks * size / count)))
        values = []
        for part in range(parts):
            weights = np.ones(count)
            kept = np.delete(members, np.s_[part::parts])
            weights[members] = 0
            weights[kept] = size / len(kept)
            values.append(statistic(weights))
        variance += (parts - 1) / parts * float(np.square(np.array(values) - np.mean(values)).sum())
    value, error = statistic(np.ones(count)), math.sqrt(variance)
    how = "1.96 jackknife standard errors" + (" within classes" if by_class else "")
    return Measure(value, max(least, value - Z * error), value + Z * error, count, how, error)


def percentile(statistic: Callable[[Indices], float], count: int, resamples: int = 2000, seed: int = 0) -> Measure:
    """Value with the percentile interval of a bootstrap over images, without draws that are not finite."""
    draws = resample(statistic, count, resamples, seed)
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws, [0.025, 0.975])
    how = f"{resamples} bootstrap resamples over images"
    return Measure(statistic(np.arange(count)), float(low), float(high), count, how, float(draws.std(ddof=1)))


def of_mean(values: NDArray[np.floating], resamples: int = 2000, seed: int = 0) -> Measure:
    """Mean of one number per image (N,), with the percentile bootstrap."""
    x = np.asarray(values, np.float64)
    return percentile(lambda chosen: float(x[chosen].mean()), len(x), resamples, seed)


def of_share(hits: NDArray[np.bool_], how: str = "Wilson score") -> Measure:
    """Share of hits (N,) with its Wilson score interval."""
    n, p = len(hits), float(hits.mean())
    spread = Z * Z / n
    half = Z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    low, high = ((p + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))
    return Measure(p, low, high, n, how, math.sqrt(p * (1 - p) / n))
