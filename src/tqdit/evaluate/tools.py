"""What an evaluation measures with: extractor, reference, metrics, and how it describes them."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdit.calibration.work import versions
from tqdit.card import GraphCard
from tqdit.console import Console
from tqdit.demo.glyphs import IMAGE_SIZE, draw
from tqdit.errors import UsageError
from tqdit.evaluate.evaluation import MetricChoice, Metrics, check_reference, describe_reference
from tqdit.evaluate.extractors import Extractor, InceptionExtractor, JudgeExtractor
from tqdit.evaluate.names import METRICS
from tqdit.evaluate.observe import Observed
from tqdit.evaluate.samples import Images, Reference, read_reference
from tqdit.evaluate.samples import write_reference as write_statistics
from tqdit.evaluate.statistics import Gaussian
from tqdit.extras import need

DATA_SEED, DATA_COUNT = 20_000, 4096  # the demo model's reference: drawings that no training has seen


@dataclass(frozen=True)
class MeasurementOptions:
    """What to measure with. None: the default for the images."""

    reference: Path | None = None
    inception_weights: Path | None = None
    metrics: tuple[str, ...] | None = None  # these and no others; one that cannot be computed is an error
    resamples: int | None = None
    seed: int = 0
    write_reference: Path | None = None  # where the statistics of the samples go


def choose_metrics(
    options: MeasurementOptions, console: Console, shape: tuple[int, ...], card: GraphCard | None
) -> Callable[[], Metrics] | None:
    """What makes the metrics for images of this shape (H, W, ...), or None if there is no extractor for them.

    Files are read and checked here; the features of the reference are extracted when the result is called.
    """
    extractor: Extractor
    if options.inception_weights is not None:
        extractor = InceptionExtractor(options.inception_weights)
    elif shape[:2] == (IMAGE_SIZE, IMAGE_SIZE):
        extractor = JudgeExtractor()
    else:
        if options.reference is not None or options.metrics or options.write_reference is not None:
            raise UsageError(
                f"images of {shape[1]}x{shape[0]} need Inception for --reference and --metrics. Pass "
                "--inception-weights FILE."
            )
        return None
    reference = _reference(options.reference, console, extractor, card)
    if reference is not None:
        check_reference(reference, extractor)
    resamples = options.resamples or (200 if extractor.size < 512 else 20)
    choice = MetricChoice(options.metrics or METRICS, options.metrics is not None, resamples, options.seed)
    return lambda: Metrics(
        extractor, None if reference is None else describe_reference(reference, extractor, console), choice
    )


def _reference(path: Path | None, console: Console, extractor: Extractor, card: GraphCard | None) -> Reference | None:
    """The file that was named; the demo model's data if the judge measures it; otherwise none."""
    if path is not None:
        return read_reference(path)
    if extractor.name != "judge" or (card is not None and card.model != "demo"):
        return None
    need("matplotlib", "evaluate", "drawing the demo model's data as a reference")
    console.say(f"drawing {DATA_COUNT} images of the demo model's data set as the reference")
    pixels, labels = draw(DATA_COUNT, DATA_SEED)
    source = f"{DATA_COUNT} drawings of the demo data set, seed {DATA_SEED}"
    return Reference(source, Images(pixels, labels, source))


def write_reference(path: Path, images: Observed) -> None:
    """Write the statistics of these images as a reference for later runs."""
    pooled, spatial = (None if x is None else Gaussian.of(x) for x in (images.features.pooled, images.features.spatial))
    assert pooled is not None
    write_statistics(path, pooled, spatial, images.extractor, len(images))


def describe(settings: Mapping[str, Any], metrics: Metrics | None) -> dict[str, Any]:
    """How everything was measured; `settings` are those of the sampling."""
    facts: dict[str, Any] = {
        "tqdit_evaluation": 1,
        "versions": versions(),
        "machine": {"processor": processor(), "platform": platform.platform(), "python": platform.python_version()},
        "settings": dict(settings),
        "extractor": None, "reference": None, "not_computed": {},
    }  # fmt: skip
    if metrics is not None:
        facts["extractor"] = {
            "name": metrics.extractor.name, "weights": metrics.extractor.digest, "features": metrics.extractor.size
        }  # fmt: skip
        facts["settings"]["bootstrap"] = metrics.choice.resamples
        facts["not_computed"] = dict(metrics.missing)
        if metrics.target is not None:
            facts["reference"] = {"name": metrics.target.source, "count": metrics.target.count}
    return facts


def processor() -> str:
    """The name that the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
