"""Readiness after failures of an engine, as a load balancer sees it; and what the metrics count."""

from __future__ import annotations

import time

import pytest

from serve.client import GENERATIONS, HEAD, text_app
from serve.test_limits import everything
from support import wait_until
from tqdit.engines.bundle import read_manifest
from tqdit.serve import engines
from tqdit.serve.settings import Settings

OFTEN_S = 0.05  # between two probes


def ready(running):
    answer = running.ask("/health/ready")
    return answer.status, answer.json.get("model")


def test_an_engine_that_fails_whatever_it_is_asked_is_not_ready_until_a_call_succeeds(gated, monkeypatch):
    """No request comes meanwhile, as behind a load balancer."""
    monkeypatch.setattr(engines, "PROBE_S", OFTEN_S)
    running, gate = gated()
    gate.error = RuntimeError("out of memory")
    assert running.ask(GENERATIONS, {"class": 1}).status == 500
    wait_until(lambda: ready(running) == (503, "toy"))
    calls = gate.calls
    wait_until(lambda: gate.calls > calls + 1)
    assert running.ask("/health/ready").json["status"] == "engine_fails"
    assert running.ask("/health/live").status == 200
    gate.error = None
    wait_until(lambda: ready(running) == (200, None))
    calls = gate.calls
    time.sleep(4 * OFTEN_S)
    assert gate.calls == calls  # it asks no more


def test_an_image_that_succeeds_makes_a_failing_engine_ready(gated):
    running, gate = gated()
    gate.error = RuntimeError("out of memory")
    assert running.ask(GENERATIONS, {"class": 1}).status == 500
    wait_until(lambda: ready(running) == (503, "toy"))
    gate.error = None
    assert running.ask(GENERATIONS, {"class": 1}).status == 200
    assert ready(running) == (200, None)


def test_a_request_that_fails_alone_leaves_the_engine_ready(gated):
    running, gate = gated()
    (engine,) = running.service.engines.values()
    network = engine.batcher.sampler._network

    def fails_for_3(inputs):
        if 3 in inputs["class_labels"]:
            raise RuntimeError("no such class")
        return network(inputs)

    engine.batcher.sampler._network = fails_for_3
    assert running.ask(GENERATIONS, {"class": 3}).status == 500
    wait_until(lambda: engine._probing is not None and engine._probing.done())
    assert gate.calls == 1
    assert ready(running) == (200, None)


def test_an_encoder_that_fails_whatever_it_is_asked_is_not_ready(serve, bundle, monkeypatch):
    monkeypatch.setattr(engines, "PROBE_S", OFTEN_S)
    is_broken = True

    def before():
        if is_broken:
            raise RuntimeError("out of memory")

    running = serve(text_app(read_manifest(bundle), before=before))
    assert running.ask(GENERATIONS, {"prompt": "ab"}).status == 500
    wait_until(lambda: ready(running) == (503, "toy"))
    is_broken = False
    wait_until(lambda: ready(running) == (200, None))
    assert running.ask(GENERATIONS, {"prompt": "ab"}).status == 200


@pytest.mark.slow
def test_answers_that_the_application_does_not_give_are_counted(serve, bundle):
    running = serve(settings=Settings(client_s=0.3), tiny=bundle)
    for sent in (b"NONSENSE\r\n\r\n", b"POST /v1", HEAD + b"Content-Length: 99\r\n\r\n{"):
        with running.connect() as client:
            client.sendall(sent)
            assert everything(client)
    text = running.ask("/metrics").content.decode()
    found = [line for line in text.splitlines() if line.startswith("tqdit_answers_total")]
    assert sorted(found) == [
        'tqdit_answers_total{route="none",status="400"} 1.0', 'tqdit_answers_total{route="none",status="408"} 2.0'
    ]  # fmt: skip
