"""Two sets of images from the same noise, one by one: no reference is needed."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import UsageError
from tqdit.evaluate.bootstrap import Measure, resample

Images = NDArray[np.uint8]  # (N, H, W, 3)
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM (Wang et al. 2004)
PEAK = 255.0


def relative_errors(reference: NDArray[np.floating], found: NDArray[np.floating]) -> NDArray[np.float64]:
    """|found - reference|^2 / |reference|^2 of each image: arrays (N, ...) to (N,)."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (reference, found))
    energy = np.square(a).sum(axis=1)
    error = np.square(b - a).sum(axis=1)
    return np.asarray(np.divide(error, energy, out=np.where(error > 0, np.inf, 0.0), where=energy > 0))


def mean_squared_errors(reference: Images, found: Images) -> NDArray[np.float64]:
    """Of each image, in squared grey levels: (N,)."""
    check_pairs(reference, found)
    difference = reference.astype(np.float64) - found
    return np.asarray(np.square(difference).reshape(len(difference), -1).mean(axis=1))


def psnr(reference: Images, found: Images, resamples: int = 200, seed: int = 0) -> Measure:
    """10 log10(255^2 / MSE) in dB, MSE over all images together, so that equal images do not make it infinite."""
    errors = mean_squared_errors(reference, found)

    def decibels(mse: float) -> float:
        return 10 * math.log10(PEAK**2 / mse) if mse > 0 else math.inf

    value = decibels(float(errors.mean()))
    if not math.isfinite(value):
        return Measure(None, None, None, len(errors), "equal images")
    draws = resample(lambda chosen: decibels(float(errors[chosen].mean())), len(errors), resamples, seed)
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Measure(value, float(low), float(high), len(errors), f"{resamples} bootstrap resamples over images",
                   float(draws.std(ddof=1)))  # fmt: skip


def ssim(reference: Images, found: Images) -> NDArray[np.float64]:
    """Structural similarity of each image pair, -1..1: (N,).

    Wang et al. 2004: Gaussian window of 11 pixels (the largest odd number that fits, for smaller images) and sigma 1.5,
    K1 0.01, K2 0.03, over the positions where the window fits, mean over the three channels.
    """
    check_pairs(reference, found)
    return np.array([_ssim(a, b) for a, b in zip(reference, found, strict=True)])


def check_pairs(reference: Images, found: Images) -> None:
    if reference.shape != found.shape:
        raise UsageError(
            f"images of shape {reference.shape[1:]} (N = {len(reference)}) cannot be paired with {found.shape[1:]} "
            f"(N = {len(found)}). Sample both with the same model, count and seed."
        )


def _ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    size = min(WINDOW, *(side - (side + 1) % 2 for side in x.shape[:2]))
    position = np.arange(size) - size // 2
    window = np.exp(-(position**2) / (2 * SIGMA**2))
    window /= window.sum()

    def blur(image: NDArray[np.float64]) -> NDArray[np.float64]:
        for axis in (0, 1):
            image = np.lib.stride_tricks.sliding_window_view(image, size, axis=axis) @ window
        return image

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    values = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((values / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())
