"""Servers of tiny engines."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from serve.client import DEFAULTS, Running, toy_service
from tqdit.engines.bundle import read_manifest
from tqdit.serve.app import make_app
from tqdit.serve.settings import Settings


@pytest.fixture(scope="module")
def serve() -> Iterator[Any]:
    """serve(application) -> Running; serve(name=bundle, ...) of bundles."""
    running: list[Running] = []

    def start(app: Any = None, settings: Settings = DEFAULTS, **engines: Any) -> Running:
        running.append(Running(app or make_app(engines, settings)))
        return running[-1]

    yield start
    for each in running:
        each.stop()


@pytest.fixture(scope="module")
def quick(serve: Any, bundle: Any) -> Running:
    """One engine named tiny."""
    return serve(tiny=bundle)


class Gate:
    """A network of zeros that waits before each call until it may go on, if it is closed."""

    def __init__(self, card: Any) -> None:
        self.card, self.open, self.error = card, threading.Event(), None
        self.calls, self.call_s = 0, 0.0
        self.open.set()

    def __call__(self, inputs: Any) -> np.ndarray:
        self.open.wait(60)
        time.sleep(self.call_s)
        self.calls += 1
        if self.error is not None:
            raise self.error
        rows = len(inputs[self.card.signature.state.name])
        return np.zeros((rows, *self.card.signature.output_shape), np.float32)


@pytest.fixture
def gated(serve: Any, bundle: Any) -> Iterator[Any]:
    """gated(settings) -> (Running, Gate): an engine of one image per call that the test stops."""
    gates: list[Gate] = []

    def start(settings: Settings = DEFAULTS, batch: int = 1) -> tuple[Running, Gate]:
        gate = Gate(read_manifest(bundle).card)
        gates.append(gate)
        return serve(toy_service(gate.card, gate, settings, batch=batch)), gate

    yield start
    for gate in gates:
        gate.open.set()
