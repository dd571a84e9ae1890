"""Two sets of images from the same noise, one by one: no reference is needed."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import UsageError
from tqdit.evaluate.bootstrap import Indices, Measure, percentile
from tqdit.extras import need

Images = NDArray[np.uint8]  # (N, H, W, 3)
SIGMA = 1.5  # pixels, of the window of SSIM
PEAK = 255.0
RESAMPLES = 200
BATCH = 16  # pairs at a time, which bounds the memory that SSIM takes


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


def psnr(reference: Images, found: Images) -> Measure:
    """10 log10(255^2 / MSE) in dB, MSE over all images together, so that equal images do not make it infinite."""
    errors = mean_squared_errors(reference, found)

    if not errors.any():
        return Measure(None, None, None, len(errors), "equal images")

    def decibels(chosen: Indices) -> float:
        mse = float(errors[chosen].mean())
        return 10 * math.log10(PEAK**2 / mse) if mse > 0 else math.inf

    return percentile(decibels, len(errors), RESAMPLES, seed=0)


def ssim(reference: Images, found: Images) -> NDArray[np.float64]:
    """Structural similarity of each image pair, -1..1: (N,), computed by torchmetrics in float64.

    Wang et al. 2004: Gaussian window of 11 pixels and sigma 1.5, K1 0.01, K2 0.03, over the positions at which the
    window fits, mean over the three channels. Smaller images get the largest odd window that fits, with a sigma
    of 2/7 of its half width.
    Raises UsageError for images that are no pairs or have fewer than 3 pixels on a side.
    """
    check_pairs(reference, found)
    need("torchmetrics", "evaluate", "SSIM")
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    smallest = min(reference.shape[1:3])
    if smallest < 3:
        raise UsageError(f"SSIM needs images of at least 3x3 pixels, these have {smallest} on a side.")
    half = min(5, (smallest - 1) // 2)
    sigma = SIGMA if half == 5 else half / 3.5  # torchmetrics' window has 2 int(3.5 sigma + 0.5) + 1 pixels
    values = []
    for start in range(0, len(reference), BATCH):
        a, b = (
            torch.from_numpy(images[start : start + BATCH].transpose(0, 3, 1, 2).astype(np.float64))
            for images in (reference, found)
        )
        _, at_each_pixel = structural_similarity_index_measure(
            a, b, sigma=sigma, data_range=PEAK, reduction="none", return_full_image=True
        )
        inner = at_each_pixel[..., half:-half, half:-half]  # positions that need no padding
        values.append(inner.flatten(1).mean(dim=1).numpy())
    return np.concatenate(values)


def check_pairs(reference: Images, found: Images) -> None:
    if reference.shape != found.shape:
        raise UsageError(
            f"images of shape {reference.shape[1:]} (N = {len(reference)}) cannot be paired with {found.shape[1:]} "
            f"(N = {len(found)}). Sample both with the same model, count and seed."
        )
