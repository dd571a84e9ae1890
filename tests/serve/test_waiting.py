"""Requests that wait, for an encoder, an engine call or a reader: their places, their deadline, their end."""

import contextlib
import json
import signal
import threading
import time

import pytest

from serve.client import GENERATIONS, HEAD, Running, text_app
from serve.test_limits import in_background
from support import wait_until
from tqdit.engines.bundle import read_manifest
from tqdit.serve import jobs
from tqdit.serve.connection import LEAST_BYTES, connection_type
from tqdit.serve.engines import MOST_ENCODERS
from tqdit.serve.settings import Settings

PROMPT = {"prompt": "ab", "steps": 2}
ALIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def encoding(bundle):
    """encoding(settings, batch) -> (Running, Event): prompts are encoded once the event is set."""
    started = []

    def start(settings, batch=1):
        go = threading.Event()
        app = text_app(read_manifest(bundle), settings, batch, before=lambda: go.wait(60))
        started.append((Running(app), go))
        return started[-1]

    yield start
    for running, go in started:
        go.set()
        running.stop()


def waiting(running):
    line = next(line for line in running.ask("/metrics").content.decode().splitlines() if "waiting_images{" in line)
    return float(line.rpartition(" ")[2])


def test_prompts_that_wait_for_an_encoder_have_places_in_the_queue(encoding):
    running, go = encoding(Settings(queue=3), batch=1)
    asked = [in_background(running.ask, GENERATIONS, PROMPT) for _ in range(4)]
    wait_until(lambda: waiting(running) == 4)
    answer = running.ask(GENERATIONS, PROMPT)
    assert (answer.status, answer.error["code"]) == (429, "queue_full")
    go.set()
    for thread, found in asked:
        thread.join(20)
        assert found[0].status == 200
    assert waiting(running) == 0


@pytest.mark.parametrize("path", [GENERATIONS, "/v1/jobs"])
def test_a_client_that_leaves_while_its_prompt_waits_frees_its_place(encoding, path):
    running, go = encoding(Settings(queue=0), batch=4)
    body = json.dumps(PROMPT).encode()
    for _ in range(3):  # more than there are encoders
        clients = [running.connect() for _ in range(4)]
        for client in clients:
            client.sendall(HEAD.replace(GENERATIONS.encode(), path.encode())
                           + b"Content-Length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
        wait_until(lambda: waiting(running) == 4)
        for client in clients:
            client.close()
        wait_until(lambda: waiting(running) == 0)
    go.set()
    assert running.ask(GENERATIONS, PROMPT).status == 200


def test_a_deadline_counts_the_time_of_the_encoder(encoding):
    running, _ = encoding(Settings(deadline_s=0.2))
    answer = running.ask(GENERATIONS, PROMPT)
    assert (answer.status, answer.error["code"]) == (504, "deadline")
    assert waiting(running) == 0


def test_a_deadline_does_not_wait_for_the_engine_call_in_progress(gated):
    running, gate = gated(Settings(deadline_s=0.2))
    gate.open.clear()
    answer = running.ask(GENERATIONS, {"class": 1})  # while it is closed
    assert (answer.status, answer.error["code"]) == (504, "deadline")


@pytest.mark.parametrize(("shutdown_s", "signals"), [(0.2, 1), (60, 2)])
def test_an_end_answers_all_that_wait_without_the_engine_call_in_progress(gated, shutdown_s, signals):
    running, gate = gated(Settings(shutdown_s=shutdown_s))
    gate.open.clear()
    asked = [in_background(running.ask, GENERATIONS, {"class": 1}) for _ in range(2)]
    wait_until(lambda: running.running() == 2)
    running.server.should_exit = True
    time.sleep(0.3)
    running.server.force_exit = signals == 2
    for thread, found in asked:
        thread.join(10)
        assert (found[0].status, found[0].error["code"]) == (503, "shutting_down")
    gate.open.set()
    running.stop()


def test_an_end_answers_prompts_that_wait_for_an_encoder(encoding):
    running, go = encoding(Settings(shutdown_s=0.2))
    thread, found = in_background(running.ask, GENERATIONS, PROMPT)
    wait_until(lambda: waiting(running) == 1)
    running.server.should_exit = True
    thread.join(10)
    assert (found[0].status, found[0].error["code"]) == (503, "shutting_down")
    go.set()


def test_a_request_that_came_along_with_another_is_whole(gated):
    running, gate = gated(Settings(client_s=0.2))
    gate.open.clear()
    body = json.dumps({"class": 1, "steps": 1}).encode()
    with running.connect() as client:
        client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n" + HEAD
                       + b"Content-Length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
        time.sleep(0.8)
        gate.open.set()
        found = b""
        while b'"data"' not in found and (part := client.recv(65536)):
            found += part
    assert found.count(b"HTTP/1.1 200 ") == 2


class Clock:
    """In place of a loop: `call_later` is done when the test says so."""

    def __init__(self):
        self.calls = []

    def call_later(self, seconds, call):
        self.calls.append(call)
        return self

    def cancel(self):
        pass

    def tick(self):
        calls, self.calls = self.calls, []
        for call in calls:
            call()


class Transport:
    """`left` bytes of an answer wait for the client."""

    def __init__(self, left):
        self.left, self.is_open = left, True

    def get_write_buffer_size(self):
        return self.left

    def is_closing(self):
        return not self.is_open

    def get_extra_info(self, name):
        assert name == "socket"
        return self

    def fileno(self):
        return -1

    def setsockopt(self, *_):
        pass

    def abort(self):
        self.is_open = False


@pytest.mark.parametrize(("taken", "kept"), [(LEAST_BYTES, True), (LEAST_BYTES // 2, False), (0, False)])
def test_an_answer_that_was_handed_over_may_be_taken_at_the_least_speed(taken, kept):
    kind = connection_type(Settings(), print)
    connection = kind.__new__(kind)
    connection.loop, connection.transport = Clock(), Transport(10 * LEAST_BYTES)
    connection.cycle = None
    connection._expect_request()  # as when the answer is complete
    for _ in range(6):
        connection.loop.tick()
        connection.transport.left -= taken
    assert connection.transport.is_open == kept


def test_a_time_to_come_back_is_that_of_images_in_work(gated):
    running, _ = gated(batch=2)
    (engine,) = running.service.engines.values()
    assert int(engine.full(1).headers["Retry-After"]) == 5  # nothing is known
    for seconds in (3, 5):
        engine.finished(seconds)
    assert [int(engine.full(count).headers["Retry-After"]) for count in (1, 2, 3, 1000)] == [4, 4, 8, 60]


def test_a_stream_whose_job_is_cancelled_ends_with_an_error(gated):
    running, gate = gated()
    gate.open.clear()
    body = {"class": 1, "steps": 2, "n": 2, "stream": True, "response_format": "url"}
    with running.streaming(GENERATIONS, body) as events:
        (job,) = running.service.jobs
        assert running.ask(f"/v1/jobs/{job.id}", method="DELETE").status == 204
        gate.open.set()
        found = list(events)
    assert found[-1][0] == "error"
    assert found[-1][1]["error"]["code"] == "client_closed"


def test_a_request_whose_job_is_cancelled_by_another_is_told(gated):
    running, gate = gated()
    gate.open.clear()
    thread, found = in_background(running.ask, GENERATIONS, {"class": 1, "response_format": "url"})
    wait_until(lambda: [*running.service.jobs])
    (job,) = running.service.jobs
    assert running.ask(f"/v1/jobs/{job.id}", method="DELETE").status == 204
    thread.join(20)
    assert (found[0].status, found[0].error["code"]) == (409, "client_closed")
    gate.open.set()


def test_a_kept_job_does_not_hold_what_was_made_of_its_prompt(encoding):
    running, go = encoding(Settings())
    go.set()
    assert running.ask("/v1/jobs", PROMPT).status == 202
    (job,) = running.service.jobs
    wait_until(lambda: running.ask(f"/v1/jobs/{job.id}").json["status"] == "completed")
    assert job.order.content is None


@pytest.mark.slow
def test_a_slow_reader_is_kept_while_it_reads_and_cut_when_it_stops(gated):
    """The kernel takes megabytes at once, and asks for more when a third is gone: after three times `client_s` here."""
    running, _ = gated(Settings(client_s=0.7))
    with running.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 600)
        assert client.recv(2**16)
        (connection,) = running.server.server_state.connections
        for _ in range(30):
            client.recv(2**16)
            time.sleep(0.1)
        assert connection in running.server.server_state.connections
        assert connection.transport.get_write_buffer_size()
        wait_until(lambda: not running.server.server_state.connections, 10)
        with pytest.raises(ConnectionResetError):  # and gets not even what the kernel had
            list(iter(lambda: client.recv(2**20), b""))


@pytest.mark.slow
def test_a_second_signal_ends_streams_with_their_error_and_leaves_nothing_in_the_log(gated, capsys):
    running, gate = gated(batch=4)
    gate.call_s = 0.01  # ten seconds for an image
    body = {"class": 1, "steps": 1000, "stream": True, "previews": 50}
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(running.streaming(GENERATIONS, body)) for _ in range(4)]
        idle = stack.enter_context(running.connect())  # it takes no answer
        idle.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 600)
        assert [next(events)[0] for events in streams] == ["image_generation.partial_image"] * 4
        running.server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.3)
        running.server.handle_exit(signal.SIGTERM, None)
        for events in streams:
            name, data = list(events)[-1]
            assert (name, data["error"]["code"]) == ("error", "shutting_down")
        running.thread.join(5)
        assert not running.thread.is_alive()
    assert not capsys.readouterr().err


def test_prompts_that_are_being_encoded_delay_no_other_engine(encoding, bundle):
    """As many as asyncio's own threads, and more."""
    running, go = encoding(Settings())
    manifest, engines = read_manifest(bundle), running.service.engines
    others = [text_app(manifest, before=lambda: go.wait(60)).state.service for _ in range(17)]
    others.append(text_app(manifest).state.service)
    for number, service in enumerate(others):
        engines[f"other{number}"] = service.engines["toy"]
    *slow, free = engines
    asked = [in_background(running.ask, GENERATIONS, PROMPT | {"model": name}) for name in slow * MOST_ENCODERS]
    wait_until(lambda: sum(engine.reserved for engine in engines.values()) == len(asked))
    thread, quick = in_background(running.ask, GENERATIONS, PROMPT | {"model": free})
    thread.join(10)
    is_quick = bool(quick)
    go.set()
    for thread, _ in asked:
        thread.join(20)
    assert is_quick
    assert [found[0].status for _, found in [*asked, (None, quick)]] == [200] * (len(asked) + 1)


@pytest.mark.slow
def test_a_deadline_names_what_was_waited_for(encoding, gated, monkeypatch):
    running, go = encoding(Settings(deadline_s=0.3))
    asked = [in_background(running.ask, GENERATIONS, PROMPT) for _ in range(MOST_ENCODERS + 1)]
    for thread, _ in asked:
        thread.join(20)
    go.set()
    told = sorted("waited for an encoder" in found[0].error["message"] for _, found in asked)
    assert told == [False] * MOST_ENCODERS + [True]

    running, gate = gated(Settings(deadline_s=0.2))
    gate.open.clear()
    assert "call of the engine" in running.ask(GENERATIONS, {"class": 1}).error["message"]
    gate.open.set()
    gate.call_s = 0.01
    answer = running.ask(GENERATIONS, {"class": 1, "steps": 1000})
    assert (answer.status, "of 1000 steps" in answer.error["message"]) == (504, True)
    gate.call_s = 0.0
    written = threading.Event()
    monkeypatch.setattr(jobs, "to_png", lambda _: written.wait(60))
    answer = running.ask(GENERATIONS, {"class": 1, "steps": 1})
    written.set()
    assert (answer.status, "written" in answer.error["message"]) == (504, True)


def test_a_second_sigterm_does_not_wait(gated):
    running, _ = gated()
    running.server.handle_exit(signal.SIGTERM, None)
    assert not running.server.force_exit
    running.server.handle_exit(signal.SIGTERM, None)
    assert running.server.force_exit


@pytest.mark.parametrize(
    ("before", "more"), [(b"", b"\r\n"), (b"", b"x"), (b"", ALIVE), (ALIVE, ALIVE)],
    ids=["a line", "a byte", "a request", "a third request"],
)  # fmt: skip
def test_a_client_that_sends_more_than_its_request_and_leaves_frees_its_row(gated, before, more):
    """before: a request that comes along with the one for images."""
    running, gate = gated()
    gate.call_s = 0.01  # ten seconds for an image
    body = b'{"class": 1, "steps": 1000}'
    with running.connect() as client:
        request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
        client.sendall(before + request + (more if before else b""))
        wait_until(lambda: gate.calls)
        client.sendall(more)
        time.sleep(0.1)
    wait_until(lambda: not running.running(), 5)
    assert gate.calls < 900


@pytest.mark.parametrize("more", [b"x" * 300_000, ALIVE * 3000], ids=["no request", "requests"])
def test_a_client_that_sends_too_much_before_its_answer_is_refused_and_frees_its_row(gated, more):
    running, gate = gated()
    gate.call_s = 0.01
    body = b'{"class": 1, "steps": 1000}'
    with running.connect() as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: gate.calls)
        with contextlib.suppress(OSError):  # the connection ends while it sends
            client.sendall(more)
        wait_until(lambda: not running.running(), 5)
    assert gate.calls < 900
