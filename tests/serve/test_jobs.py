"""Jobs and streams: progress, previews, cancel, what is kept."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading

import numpy as np
import pytest

from serve.client import GENERATIONS, HEAD, pixels
from support import wait_until
from tqdit.engines.run.sampler import Sampler
from tqdit.serve.settings import Settings


def start(running, body):
    answer = running.ask("/v1/jobs", body)
    assert answer.status == 202, answer.content
    assert answer.headers["location"] == f"/v1/jobs/{answer.json['id']}"
    return answer.json["id"]


def ended(running, name):
    wait_until(lambda: running.ask(f"/v1/jobs/{name}").json["status"] not in ("queued", "in_progress"))
    return running.ask(f"/v1/jobs/{name}").json


@pytest.mark.parametrize("form", ["b64_json", "url"])
def test_a_job_s_images_are_those_of_the_sampler(quick, bundle, form):
    name = start(quick, {"class": 2, "seed": 4, "n": 2, "response_format": form})
    job = ended(quick, name)
    assert (job["status"], job["progress"], job["steps"], job["error"]) == ("completed", [20, 20], 20, None)
    data = job["result"]["data"]
    assert [list(each) for each in data] == [[form]] * 2
    pngs = [
        base64.b64decode(each[form]) if form == "b64_json" else quick.ask(each[form].removeprefix(quick.url)).content
        for each in data
    ]  # fmt: skip
    with Sampler.open(bundle) as sampler:
        np.testing.assert_array_equal([pixels(png) for png in pngs], sampler.sample([2, 2], seed=4))


def test_a_job_moves_from_the_queue_to_its_steps_and_a_cancelled_one_frees_its_place(gated):
    running, gate = gated()
    gate.open.clear()
    first, second = (start(running, {"class": 1}) for _ in range(2))
    assert running.ask(f"/v1/jobs/{second}").json["status"] == "queued"
    assert running.running() == 2
    assert running.ask(f"/v1/jobs/{first}", method="DELETE").status == 204
    gate.open.set()
    assert ended(running, second)["status"] == "completed"
    assert running.ask(f"/v1/jobs/{first}").error["code"] == "not_found"
    assert gate.calls <= 2 * 20


def test_the_events_of_a_job_tell_its_states_previews_images_and_end(gated):
    running, gate = gated()
    gate.open.clear()
    name = start(running, {"class": 1, "steps": 12, "previews": 3, "n": 2})
    with running.streaming(f"/v1/jobs/{name}/events") as events:
        assert next(events)[0] == "job.queued"
        gate.open.set()
        told = list(events)
    names = [each for each, _ in told]
    assert names[-1] == "job.completed"
    assert names.count("image_generation.completed") == 2
    assert all(name == data["type"] for name, data in told)
    assert told[-1][1]["job"]["progress"] == [12, 12]
    previews = [data for name, data in told if name.endswith("partial_image")]
    assert all(data["step"] in (3, 6, 9) for data in previews)  # at most three, evenly spread, none of the end
    assert all(pixels(base64.b64decode(data["b64_json"])).shape == (8, 8, 3) for data in previews)
    for index in (0, 1):
        numbers = [each["partial_image_index"] for each in previews if each["image_index"] == index]
        assert numbers == [*range(len(numbers))]


def test_events_of_an_ended_job_are_its_images_and_its_end(quick):
    name = start(quick, {"class": 1, "steps": 3})
    ended(quick, name)
    with quick.streaming(f"/v1/jobs/{name}/events") as events:
        assert [name for name, _ in events] == ["image_generation.completed", "job.completed"]


@pytest.mark.slow
def test_previews_are_the_states_of_the_chain(serve, bundle_of):
    """Each is what the sampler's callback sees after the same step."""
    bundle = bundle_of(steps=1000)
    running = serve(long=bundle)
    body = {"class": 1, "seed": 3, "stream": True, "previews": 9}
    with running.streaming(GENERATIONS, body) as events:
        told = [data for name, data in events if name == "image_generation.partial_image"]
    assert 1 <= len(told) <= 9
    states = {}
    with Sampler.open(bundle) as sampler:

        def remember(report):
            states[report.steps - report.step] = sampler.to_images(report.x)[0]

        sampler.sample([1], seed=3, callback=remember)
    for each in told:
        assert each["step"] % 100 == 0
        np.testing.assert_array_equal(pixels(base64.b64decode(each["b64_json"])), states[each["step"]])


class Decoder:
    """In place of a sampler's `to_images`; the batcher's thread makes finished images by it, too."""

    def __init__(self, running):
        sampler = running.service.engines["toy"].batcher.sampler
        self.inner, sampler.to_images = sampler.to_images, self
        self.previews, self.error = 0, None

    def __call__(self, state):
        if "batcher" not in threading.current_thread().name:
            self.previews += 1
            if self.error is not None:
                raise self.error
        return self.inner(state)


def test_a_preview_is_decoded_once_for_all_who_watch(gated):
    running, gate = gated()
    decoder = Decoder(running)
    gate.open.clear()
    gate.call_s = 0.03
    name = start(running, {"class": 1, "steps": 16, "previews": 3})
    with contextlib.ExitStack() as stack:
        watchers = [stack.enter_context(running.streaming(f"/v1/jobs/{name}/events")) for _ in range(4)]
        gate.open.set()
        told = [data for events in watchers for kind, data in events if kind.endswith("partial_image")]
    assert decoder.previews <= 3 < len(told)
    assert len({each["step"] for each in told}) == decoder.previews


def test_a_preview_that_cannot_be_made_is_left_out(gated, capsys):
    running, gate = gated()
    decoder = Decoder(running)
    decoder.error, gate.call_s = RuntimeError("no memory"), 0.03
    with running.streaming(GENERATIONS, {"class": 1, "steps": 16, "stream": True, "previews": 3}) as events:
        assert [name for name, _ in events] == ["image_generation.completed"]
    assert decoder.previews
    assert "no memory" in capsys.readouterr().err


def test_a_stream_ends_with_its_images_and_its_client_s_leaving_frees_the_places(gated):
    running, gate = gated(batch=4)
    with running.streaming(GENERATIONS, {"class": 1, "n": 3, "stream": True}) as events:
        assert [name for name, _ in events] == ["image_generation.completed"] * 3
    gate.open.clear()
    with running.streaming(GENERATIONS, {"class": 1, "n": 3, "stream": True, "steps": 1000}):
        wait_until(lambda: running.running() == 3)
    gate.open.set()
    calls = gate.calls
    wait_until(lambda: running.running() == 0)
    assert gate.calls < calls + 900  # the server sees that the client left some calls later


@pytest.mark.slow
def test_a_client_that_stops_reading_its_stream_frees_the_places(gated):
    """It does not close the connection; what is sent to it fills every buffer until it is disconnected."""
    running, gate = gated(Settings(client_s=0.3, most_previews=900))
    body = b'{"class": 1, "n": 16, "steps": 1000, "stream": true, "previews": 900}'
    with running.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: running.running() > 1)
        connection = next(iter(running.server.server_state.connections))
        connection.transport.set_write_buffer_limits(2000)
        noise = np.random.default_rng(0).integers(0, 256, (1, 300, 300, 3), np.uint8)
        running.service.engines["toy"].batcher.sampler.to_images = lambda _: noise
        wait_until(lambda: not running.server.server_state.connections, 60)
        wait_until(lambda: running.running() == 0)
    assert gate.calls < 16_000


def test_a_client_that_leaves_while_it_waits_frees_its_places(gated):
    running, gate = gated()
    gate.open.clear()
    with running.connect() as client:
        body = b'{"class": 1, "n": 2}'
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: running.running() == 2)
    wait_until(lambda: running.running() <= 1)  # the one in the engine's call waits for the call
    gate.open.set()
    wait_until(lambda: running.running() == 0)
    assert gate.calls < 20
    assert b'outcome="cancelled"} 2.0' in running.ask("/metrics").content


def test_a_failed_engine_is_told_without_its_reason_and_the_next_request_is_served(gated):
    running, gate = gated()
    gate.error = RuntimeError("cannot read /tmp/secret/graph.xml")
    answer = running.ask(GENERATIONS, {"class": 1, "n": 2})
    assert (answer.status, answer.error["type"], answer.error["code"]) == (500, "server_error", "internal")
    assert "secret" not in answer.error["message"]
    with running.streaming(GENERATIONS, {"class": 1, "stream": True}) as events:
        ((name, data),) = list(events)
    assert (name, data["error"]["code"]) == ("error", "internal")
    job = ended(running, start(running, {"class": 1}))
    assert (job["status"], job["error"]["code"], job["result"]) == ("failed", "internal", None)
    gate.error = None
    assert running.ask(GENERATIONS, {"class": 1}).status == 200


def test_a_state_that_becomes_nan_is_told(serve, gated):
    running, gate = gated()
    gate.error = None
    zeros = gate.__class__.__call__
    running.service.engines["toy"].batcher._sampler._network = lambda inputs: zeros(gate, inputs) * np.nan
    answer = running.ask(GENERATIONS, {"class": 1})
    assert (answer.status, answer.error["code"]) == (500, "sampling_failed")


def test_old_jobs_are_forgotten_first(serve, bundle):
    running = serve(settings=Settings(most_jobs=2), tiny=bundle)
    names = []
    for _ in range(4):
        names.append(start(running, {"class": 1, "steps": 2}))
        assert ended(running, names[-1])["status"] == "completed"
    assert [running.ask(f"/v1/jobs/{name}").status for name in names] == [404, 404, 200, 200]


@pytest.mark.parametrize("limit", [{"keep_bytes": 1}, {"keep_s": 0.0}], ids=str)
def test_a_job_that_is_too_large_or_too_old_is_forgotten(serve, bundle, limit):
    running = serve(settings=Settings(**limit), tiny=bundle)
    name = start(running, {"class": 1, "steps": 2})
    wait_until(lambda: running.ask(f"/v1/jobs/{name}").status == 404)
    assert running.ask(f"/v1/jobs/{name}").error["code"] == "not_found"


def test_an_unknown_job_is_not_found(quick):
    for path, method in (("/v1/jobs/x", "GET"), ("/v1/jobs/x", "DELETE"), ("/v1/jobs/x/events", "GET")):
        assert quick.ask(path, method=method).error["code"] == "not_found"


def test_a_job_takes_no_stream(quick):
    assert quick.ask("/v1/jobs", {"class": 1, "stream": True}).error["param"] == "stream"


@pytest.mark.slow
def test_jobs_that_are_too_many_go_when_they_end_without_another_request(gated):
    running, gate = gated(Settings(most_jobs=1))
    gate.open.clear()
    ids = [running.ask("/v1/jobs", {"class": 1, "steps": 2}).json["id"] for _ in range(3)]
    gate.open.set()
    wait_until(lambda: len([*running.service.jobs]) == 1, 10)
    assert running.ask(f"/v1/jobs/{ids[-1]}").json["status"] == "completed"
