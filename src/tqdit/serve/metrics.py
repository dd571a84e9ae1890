"""What Prometheus reads of a service."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tqdit.serve.engines import ServedEngine
from tqdit.serve.jobs import ImageJob, Row

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)  # upper ends of the histograms' buckets


class ServerMetrics:
    """Counters and histograms of one service, in a registry of their own."""

    def __init__(self, engines: Iterable[ServedEngine]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(EngineCollector(list(engines)))
        self._answers = Counter("tqdit_answers", "answers", ("route", "status"), registry=self.registry)
        self._images = Counter(
            "tqdit_images", "images that ended, by outcome: done, cancelled, or why they failed", ("model", "outcome"),
            registry=self.registry,
        )  # fmt: skip
        self._image_seconds = Histogram(
            "tqdit_image_seconds", "from the request to the finished image", ("model",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._queue_seconds = Histogram(
            "tqdit_queue_seconds", "from the request to the image's first step", ("model",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip

    def answered(self, route: str, status: int) -> None:
        self._answers.labels(route, str(status)).inc()

    def ended(self, job: ImageJob, row: Row) -> None:
        """One image is done, failed or cancelled."""
        engine, now = job.order.engine, time.monotonic()
        if row.began is not None:
            self._queue_seconds.labels(engine.name).observe(row.began - job.submitted)
        if row.png is not None:
            engine.finished(now - (job.submitted if row.began is None else row.began))
            self._image_seconds.labels(engine.name).observe(now - job.submitted)
        self._images.labels(engine.name, _outcome(row)).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


def _outcome(row: Row) -> str:
    if row.png is not None:
        return "done"
    assert row.future is not None
    if row.future.cancelled():
        return "cancelled"
    error = row.future.exception() if row.future.done() else None
    return type(error).__name__ if error is not None else "failed"


class EngineCollector(Collector):
    """The batchers' numbers, read when they are asked for."""

    def __init__(self, engines: list[ServedEngine]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("tqdit_waiting_images", "images that wait for a place", labels=["model"])
        running = GaugeMetricFamily("tqdit_running_images", "images in every engine call", labels=["model"])
        places = GaugeMetricFamily("tqdit_places", "images per engine call at most", labels=["model"])
        calls = CounterMetricFamily("tqdit_engine_calls", "engine calls", labels=["model"])
        steps = CounterMetricFamily("tqdit_steps", "steps of all images", labels=["model"])
        families: tuple[GaugeMetricFamily | CounterMetricFamily, ...] = (waiting, running, places, calls, steps)
        for engine in self._engines:
            stats = engine.batcher.stats()
            waits = stats.waiting + engine.reserved
            values = (waits, stats.running, engine.batcher.batch, stats.engine_calls, stats.steps)
            for family, value in zip(families, values, strict=True):
                family.add_metric([engine.name], value)
        yield from families
