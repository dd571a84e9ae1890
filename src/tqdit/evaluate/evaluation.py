"""From sets of images to numbers with their noise, and one sentence about them.

A *set* is what one engine sampled: the subject, the float model on the same noise, the float model with other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.console import Console
from tqdit.errors import UsageError
from tqdit.evaluate.bootstrap import Measure, Z, around, balanced_strata, jackknife, number, of_mean, of_share
from tqdit.evaluate.chains import SampledChains
from tqdit.evaluate.extractors import Extractor, identity
from tqdit.evaluate.metrics import NEIGHBOURS, in_manifold, inception_score
from tqdit.evaluate.names import METRICS
from tqdit.evaluate.observe import Observed, Outline, observe
from tqdit.evaluate.paired import psnr, relative_errors, ssim
from tqdit.evaluate.samples import Reference
from tqdit.evaluate.statistics import Gaussian, frechet_to


@dataclass(frozen=True, eq=False)
class ReferenceFeatures:
    """A reference as an extractor sees it."""

    source: str
    pooled: Gaussian
    spatial: Gaussian | None
    features: NDArray[np.float32] | None  # for precision and recall
    count: int | None  # of samples; None if only statistics are stored


def check_reference(reference: Reference, extractor: Extractor) -> None:
    """Refuse statistics of another extractor."""
    own = identity(extractor)
    if reference.extractor is not None and reference.extractor != own:
        raise UsageError(
            f"{reference.source}: holds statistics of the extractor '{reference.extractor}', these samples are "
            f"measured with '{own}'. Use the same weights, or write a new reference with --write-reference."
        )
    if reference.pooled is not None and len(reference.pooled.mean) != extractor.size:
        raise UsageError(
            f"{reference.source}: holds statistics of {len(reference.pooled.mean)} features, the extractor "
            f"'{extractor.name}' has {extractor.size}. They are of another extractor; pass a reference that fits."
        )


def describe_reference(reference: Reference, extractor: Extractor, console: Console) -> ReferenceFeatures:
    """Features of its samples, or its stored statistics. Refuses statistics of another extractor."""
    check_reference(reference, extractor)
    found = None if reference.images is None else observe(extractor, reference.images, console).features
    pooled, spatial = reference.pooled, reference.spatial
    if pooled is None:
        assert found is not None
        pooled = Gaussian.of(found.pooled)
        spatial = None if found.spatial is None else Gaussian.of(found.spatial)
    count = None if reference.images is None else len(reference.images)
    return ReferenceFeatures(reference.source, pooled, spatial, None if found is None else found.pooled, count)


@dataclass(frozen=True)
class MetricChoice:
    """Which metrics, and with how many resamples. `required`: one that cannot be computed is an error, not a remark."""

    metrics: tuple[str, ...] = METRICS
    required: bool = False
    resamples: int = 200
    seed: int = 0


class Metrics:
    """All metrics of one set of images, each with its noise; what cannot be computed comes with the reason."""

    def __init__(self, extractor: Extractor, target: ReferenceFeatures | None, choice: MetricChoice) -> None:
        self.extractor, self.target, self.choice = extractor, target, choice
        self.missing: dict[str, str] = {}
        targets = (
            {} if target is None else {"frechet_distance": target.pooled, "spatial_frechet_distance": target.spatial}
        )
        self._distances = {
            name: (frechet_to(gaussian), gaussian.rank)
            for name, gaussian in targets.items()
            if gaussian is not None and name in choice.metrics
        }

    def choose(self, images: Outline) -> tuple[str, ...]:
        """The metrics that were asked for and can be computed; UsageError if one is required and cannot."""
        reasons = {name: self._reason_against(name, images) for name in self.choice.metrics}
        missing = {name: reason for name, reason in reasons.items() if reason is not None}
        if missing and self.choice.required:
            name, reason = next(iter(missing.items()))
            raise UsageError(f"{images.source}: {name} {reason}")
        self.missing |= missing
        return tuple(name for name in reasons if name not in missing)

    def measure(self, images: Observed) -> dict[str, Measure]:
        """Every metric that was asked for and can be computed."""
        return {name: self._compute(name, images) for name in self.choose(images.outline)}

    def excess(self, images: Observed, floats: Observed) -> Measure | None:
        """Frechet distance of these images less that of the float ones of the same noise.

        None if the distance was not asked for or cannot be computed.
        Both are left out of the jackknife together, so what the two share, bias and most of the noise, cancels.
        """
        if "frechet_distance" not in self._distances:
            return None
        distance, rank = self._distances["frechet_distance"]
        if len(images) <= rank:
            return None
        x, y = (part.features.pooled.astype(np.float64) for part in (images, floats))
        return jackknife(
            lambda weights: distance(Gaussian.of(x, weights)) - distance(Gaussian.of(y, weights)),
            len(images), self.choice.resamples, images.labels, least=-math.inf,
        )  # fmt: skip

    def distance(self, images: Observed) -> Measure | None:
        """The Frechet distance alone; None if it was not asked for or cannot be computed."""
        if "frechet_distance" not in self._distances or self._reason_against("frechet_distance", images.outline):
            return None
        return self._compute("frechet_distance", images)

    def _reason_against(self, name: str, images: Outline) -> str | None:
        """Why a metric cannot be computed, or None."""
        count, advice = images.count, "Sample more with -n."
        if name == "accuracy":
            if not self.extractor.is_judge:
                return "needs the judge of a demo model, which knows images of that model alone."
            return (
                None
                if images.has_labels
                else ("needs what the images should show: classes (arr_1 of the .npz), or captions of the text demo.")
            )
        if name == "inception_score":
            classes = self.extractor.classes
            return None if count >= classes else f"over {classes} classes needs as many samples, got {count}. {advice}"
        if self.target is None:
            return "needs a reference. Pass --reference FILE."
        if name in ("precision", "recall"):
            if self.target.features is None:
                return f"needs the samples of the reference; {self.target.source} holds statistics alone."
            least = min(count, len(self.target.features))
            return (
                None
                if least > NEIGHBOURS
                else f"needs more than {NEIGHBOURS} images on each side, got {least}. {advice}"
            )
        if name not in self._distances:
            return "needs spatial features, which the extractor or the reference does not have."
        rank = self._distances[name][1]
        if count > rank:
            return None
        return (
            f"needs more than {rank} samples (as many directions as the reference's features vary in), got {count}: "
            f"their covariance would be singular. {advice}"
        )

    def _compute(self, name: str, images: Observed) -> Measure:
        choice, features, count, strata = self.choice, images.features, len(images), balanced_strata(images.labels)
        match name:
            case "accuracy":
                return of_share(features.probabilities.argmax(axis=1) == images.labels)
            case "inception_score":
                p = features.probabilities
                return around(lambda chosen: inception_score(p[chosen]), count, choice.resamples, choice.seed, strata)
            case "precision" | "recall":
                assert self.target is not None
                assert self.target.features is not None
                if name == "precision":
                    return of_share(in_manifold(features.pooled, self.target.features))
                how = "Wilson score over the reference, the samples as they are"
                return of_share(in_manifold(self.target.features, features.pooled), how)
        distance, _ = self._distances[name]
        x = features.pooled if name == "frechet_distance" else features.spatial
        assert x is not None
        y = x.astype(np.float64)
        return jackknife(lambda weights: distance(Gaussian.of(y, weights)), count, choice.resamples, images.labels)


@dataclass(frozen=True, eq=False)
class Pairs:
    """What two sets of the same noise differ by."""

    final: NDArray[np.float64]  # |x_0 - x_0 ref|^2 / |x_0 ref|^2 of each image (N,)
    measures: dict[str, Measure]
    steps: NDArray[np.float64]  # mean error after each step (T,), step 0 first
    groups: tuple[dict[str, Any], ...]  # one per group of timesteps


def pair_up(
    reference: SampledChains,
    found: SampledChains,
    timesteps: NDArray[np.float64],
    boundaries: Iterable[float],
    lpips: Callable[[NDArray[np.uint8], NDArray[np.uint8]], NDArray[np.float64]] | None = None,
) -> Pairs:
    """Errors of the final states, of every step and of each group, PSNR and SSIM if there are images."""
    final = relative_errors(reference.latents, found.latents)
    middle = float(np.median(final))
    measures = {
        "final_error": of_mean(final),
        "final_error_median": Measure(middle, *_median_interval(final), len(final), "order statistics"),
    }
    if reference.pixels is not None and found.pixels is not None:
        measures["psnr_db"] = psnr(reference.pixels, found.pixels)
        measures["ssim"] = of_mean(ssim(reference.pixels, found.pixels))
        if lpips is not None:
            measures["lpips"] = of_mean(lpips(reference.pixels, found.pixels))
    assert found.step_errors is not None
    group_of_step = np.searchsorted(list(boundaries), timesteps, side="right")
    groups = []
    for group in np.unique(group_of_step):
        members = np.flatnonzero(group_of_step == group)
        errors = found.step_errors[:, members].mean(axis=1)  # (N,)
        measure = of_mean(errors, resamples=500)
        groups.append({
            "group": int(group), "first_timestep": plain(timesteps[members[0]]),
            "last_timestep": plain(timesteps[members[-1]]), "error": measure.to_json(),
            "signal_to_error_db": _decibels(float(errors.mean())),
        })  # fmt: skip
    return Pairs(final, measures, found.step_errors.mean(axis=0), tuple(groups))


def plain(number: float) -> float:
    """As people write it: 999 for 999.0."""
    return int(number) if float(number).is_integer() else float(number)


def _decibels(error: float) -> float | None:
    return -10 * math.log10(error) if error > 0 else None


def _median_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of a median from the order statistics of a binomial."""
    ordered, n = np.sort(values), len(values)
    half = Z * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - half)), min(n - 1, math.ceil(n / 2 + half))
    return float(ordered[low]), float(ordered[high])


@dataclass(frozen=True)
class SeedNoise:
    """What another seed of the float model would give: mean over its seeds +- 1.96 s sqrt(1 + 1 / seeds)."""

    mean: float
    low: float
    high: float
    seeds: int
    value: float  # of the subject
    within: bool


def seed_noise(subject: Measure, floats: list[Measure]) -> SeedNoise | None:
    """Whether the subject lies where the float model's other seeds do; s is the mean bootstrap standard error."""
    values = [m.value for m in floats if m.value is not None]
    errors = [m.standard_error for m in floats if m.standard_error is not None]
    if subject.value is None or not values or not errors:
        return None
    mean = float(np.mean(values))
    half = Z * float(np.mean(errors)) * math.sqrt(1 + 1 / len(values))
    return SeedNoise(mean, max(0.0, mean - half), mean + half, len(values), subject.value, subject.value <= mean + half)


def verdict(
    name: str,
    subject: dict[str, Measure],
    floats: list[dict[str, Measure]],
    noise: SeedNoise | None,
    pairs: Pairs | None,
) -> str:
    """One sentence."""
    parts = []
    distance = subject.get("frechet_distance")
    if noise is not None:
        parts.append(
            f"{name} lies {'within' if noise.within else 'outside'} the float model's own seed noise: Frechet "
            f"distance {number(noise.value)}, float {number(noise.mean)} ({number(noise.low)} to "
            f"{number(noise.high)} expected of another float seed)"
        )
    elif distance is not None:
        parts.append(f"{name} is at Frechet distance {distance} from the reference, with no float model to compare")
    else:
        parts.append(f"{name} was measured without a Frechet distance")
    accuracy = subject.get("accuracy")
    if accuracy is not None and accuracy.value is not None:
        text = f"{accuracy.value:.1%} of {accuracy.count} images are recognised"
        of_float = floats[0].get("accuracy") if floats else None
        if of_float is not None and of_float.value is not None:
            text += f" ({of_float.value:.1%} in float)"
        parts.append(text)
    if pairs is not None:
        if "frechet_excess" in pairs.measures:
            parts[0] += f", {pairs.measures['frechet_excess']} above float on the same noise"
        parts.append(f"same-noise error of x_0 {pairs.measures['final_error']}")
    return "; ".join(parts) + "."
