"""A service under load, with clients that are slow, wrong or many, and its end."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import replace

import pytest

from serve.client import GENERATIONS, HEAD, Running
from support import wait_until
from tqdit.cli.serve import LOCAL
from tqdit.errors import UsageError
from tqdit.serve.settings import Settings

KEY = "a-key-of-this-test"


def in_background(function, *arguments):
    """A thread, and the list that gets what the function returns."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*arguments)))
    thread.start()
    return thread, found


def test_a_full_queue_is_429_with_a_time_to_come_back_and_nothing_of_the_request_is_queued(gated):
    running, gate = gated(Settings(queue=2))
    gate.open.clear()
    assert running.ask("/v1/jobs", {"class": 1, "n": 2}).status == 202
    for path in (GENERATIONS, "/v1/jobs"):
        answer = running.ask(path, {"class": 1, "n": 2})
        assert (answer.status, answer.error["type"], answer.error["code"]) == (429, "rate_limit_error", "queue_full")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert running.running() == 2
    assert running.ask("/v1/jobs", {"class": 1}).status == 202
    gate.open.set()
    wait_until(lambda: running.running() == 0)
    assert running.ask(GENERATIONS, {"class": 1, "n": 3}).status == 200
    assert running.ask(GENERATIONS, {"class": 1, "n": 4}).error["param"] == "n"  # never fits


def test_a_deadline_is_504_and_frees_the_places(gated):
    running, gate = gated(Settings(deadline_s=0.2))
    gate.open.clear()
    thread, found = in_background(running.ask, GENERATIONS, {"class": 1, "n": 2})
    time.sleep(0.3)
    gate.open.set()
    thread.join(20)
    assert (found[0].status, found[0].error["code"]) == (504, "deadline")
    wait_until(lambda: running.running() == 0)
    assert running.ask(GENERATIONS, {"class": 1}).status == 200


@pytest.fixture(scope="module")
def guarded(serve, bundle):
    return serve(settings=Settings(api_key=KEY, client_s=0.5), tiny=bundle)


@pytest.mark.parametrize(
    "value", [None, "", KEY, "Bearer", "Bearer x", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer \xff"]
)
@pytest.mark.parametrize("path", ["/v1/models", GENERATIONS, "/v1/jobs", "/v1/jobs/x", "/v1/jobs/x/events", "/metrics"])
def test_without_the_key_nothing_is_answered(guarded, path, value):
    body = {"class": 1} if path in (GENERATIONS, "/v1/jobs") else None
    headers = {} if value is None else {"Authorization": value}
    answer = guarded.ask(path, body, **headers)
    assert (answer.status, answer.error["type"]) == (401, "authentication_error")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert KEY not in answer.content.decode()


def test_with_the_key_everything_is_and_probes_need_none(guarded):
    right = {"Authorization": f"Bearer {KEY}"}
    assert guarded.ask("/v1/models", **right).status == 200
    body = {"class": 1, "steps": 2, "response_format": "url"}
    url = guarded.ask(GENERATIONS, body, **right).json["data"][0]["url"]
    for path in (url.removeprefix(guarded.url), "/", "/health/live", "/health/ready", "/openapi.json"):
        assert guarded.ask(path).status == 200


@pytest.mark.parametrize("key", ["", "short", "with space", "ümlaut-key", "line\nbreak"])
def test_a_weak_key_is_refused_and_never_shown(key):
    with pytest.raises(UsageError, match="API key has") as caught:
        Settings(api_key=key)
    assert not key or key not in str(caught.value)
    assert KEY not in repr(Settings(api_key=KEY))


def test_pages_of_other_origins_may_call_only_if_the_operator_says_so(serve, quick, bundle):
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    refused = quick.ask(GENERATIONS, method="OPTIONS", **ask)
    assert refused.status == 405
    open_to = serve(settings=Settings(cors_origins=("https://a.example",)), tiny=bundle)
    granted = open_to.ask(GENERATIONS, method="OPTIONS", **ask)
    assert granted.headers["access-control-allow-origin"] == "https://a.example"
    other = open_to.ask("/v1/models", Origin="https://b.example")
    assert "access-control-allow-origin" not in other.headers
    with pytest.raises(UsageError, match=r"a\.example/x"):
        Settings(cors_origins=("https://a.example/x",))


@pytest.mark.parametrize("head", [b"Content-Length: 600000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
def test_a_body_that_is_too_large_is_refused_before_it_is_all_there(quick, head):
    with quick.connect() as client:
        client.sendall(HEAD + head + (b"11000\r\n" if b"chunked" in head else b"") + b" " * 0x11000)
        answer = b""
        while b'"too_large"' not in answer and (part := client.recv(2000)):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"too_large"' in answer


@pytest.mark.parametrize("size", [66_000, 500_000])
def test_a_client_that_reads_after_it_has_sent_too_much_gets_its_answer(quick, size):
    answer = quick.ask(GENERATIONS, b" " * size)
    assert (answer.status, answer.error["code"]) == (413, "too_large")


@pytest.mark.parametrize(
    "sent", [b"NONSENSE\r\n\r\n", b"\x16\x03\x01\x02\x00\r\n\r\n",
             b"GET /\x00 HTTP/1.1\r\n\r\n",
             b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000,
             b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
             b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
             b"GET " + b"/a" * 50_000], ids=lambda sent: str(sent[:30]),
)  # fmt: skip
def test_what_is_no_http_is_answered_with_400_in_the_shape_of_every_error(quick, sent):
    with quick.connect() as client:
        with contextlib.suppress(OSError):
            client.sendall(sent)
        answer = everything(client)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def everything(client):
    """What a server sends until it closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(5000):
            found += part
    return found


@pytest.mark.parametrize(
    ("sent", "answers"),
    [(b"", 0), (b"POST /v1", 1), (HEAD + b"Content-Length: 99\r\n\r\n{", 1),
     (b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\nGET /", 1)],
    ids=["nothing", "half a head", "half a body", "half a second request"],
)  # fmt: skip
def test_a_client_that_stalls_is_told_and_disconnected(guarded, sent, answers):
    started = time.monotonic()
    with guarded.connect() as client:
        client.sendall(sent.replace(b"application/json", f"application/json\r\nAuthorization: Bearer {KEY}".encode()))
        answer = everything(client)
    assert time.monotonic() - started < 10
    assert answer.count(b"HTTP/1.1 408 ") == answers
    if answers:
        assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["code"] == "too_slow"
    assert guarded.ask("/health/live").status == 200


def test_a_client_that_does_not_take_its_answer_is_disconnected_and_frees_its_places(gated):
    """It asks for the page again and again and reads nothing, so the answers fill every buffer."""
    running, _ = gated(Settings(client_s=0.3))
    ask = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    with running.connect() as client, contextlib.suppress(OSError):
        client.settimeout(20)
        while True:
            client.sendall(ask * 100)
    wait_until(lambda: not running.server.server_state.connections)
    assert running.ask("/health/live").status == 200  # and the others are served


def test_a_long_wait_for_an_image_is_no_stalling(gated):
    running, gate = gated(Settings(client_s=0.2))
    gate.open.clear()
    thread, found = in_background(running.ask, GENERATIONS, {"class": 1})
    time.sleep(0.8)
    gate.open.set()
    thread.join(20)
    assert found[0].status == 200


def test_the_number_of_connections_is_bounded(serve, bundle):
    running = serve(settings=Settings(connections=2), tiny=bundle)
    with running.connect() as first, running.connect() as second:
        for client in (first, second):
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        with running.connect() as third, contextlib.suppress(ConnectionResetError):
            assert third.recv(1000) == b""

    def answers():
        with contextlib.suppress(OSError):
            return running.ask("/health/live").status == 200

    wait_until(answers)


def end_while_working(gated, settings, form="url"):
    """(Running, Gate, what a client that waits gets, the thread that ends the server)."""
    running, gate = gated(settings)
    gate.open.clear()
    waiting = in_background(running.ask, GENERATIONS, {"class": 1, "response_format": form})
    wait_until(lambda: running.running() == 1)
    unseen = running.ask("/v1/jobs", {"class": 2}).json["id"]
    ending = in_background(Running.stop, running)[0]
    wait_until(lambda: running.service.is_draining)
    return running, gate, waiting, ending, unseen


@pytest.mark.parametrize("form", ["b64_json", "url"])
def test_an_end_finishes_what_a_client_waits_for_and_drops_what_nobody_can_fetch(gated, form):
    running, gate, (thread, found), ending, _ = end_while_working(gated, Settings(shutdown_s=20), form)
    with contextlib.suppress(OSError):
        assert running.ask("/health/ready").status == 503  # the socket is closed soon
    assert running.service.health().status == "shutting_down"
    gate.open.set()
    thread.join(20)
    ending.join(30)
    assert found[0].status == 200
    assert gate.calls == 20  # of one image


def test_an_end_within_a_limit_refuses_what_is_not_done(gated):
    _, gate, (thread, found), ending, _ = end_while_working(gated, Settings(shutdown_s=0.2))
    time.sleep(0.4)
    gate.open.set()
    thread.join(20)
    ending.join(30)
    assert (found[0].status, found[0].error["code"]) == (503, "shutting_down")
    assert gate.calls < 20


def test_an_engine_whose_thread_has_ended_is_not_ready(gated):
    running, _ = gated()
    assert running.ask("/health/ready").json == {"status": "ok"}
    running.service.engines["toy"].batcher.close()
    assert running.ask(GENERATIONS, {"class": 1}).status == 503
    answer = running.ask("/health/ready")
    assert (answer.status, answer.json["status"]) == (503, "engine_stopped")
    assert running.ask("/health/live").status == 200


@pytest.mark.parametrize(
    "wrong", [{"queue": -1}, {"deadline_s": 0}, {"deadline_s": float("nan")}, {"most_images": 0}, {"batch": 0},
              {"threads": 0}, {"shutdown_s": -1}, {"connections": 0}, {"most_previews": -1}], ids=str
)  # fmt: skip
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UsageError, match="expected"):
        replace(Settings(), **wrong)


def metrics(running):
    """Name and labels -> value."""
    text = running.ask("/metrics").content.decode()
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")


def test_the_metrics_count_what_happened(serve, bundle):
    running = serve(tiny=bundle)
    assert running.ask(GENERATIONS, {"class": 1, "n": 3}).status == 200
    assert running.ask(GENERATIONS, {}).status == 400
    assert running.ask("/nowhere").status == 404
    lines = metrics(running)
    assert float(lines['tqdit_steps_total{model="tiny"}']) == 60
    assert 20 <= float(lines['tqdit_engine_calls_total{model="tiny"}']) <= 60
    assert float(lines['tqdit_images_total{model="tiny",outcome="done"}']) == 3
    for name in ("tqdit_image_seconds", "tqdit_queue_seconds"):
        assert float(lines[f'{name}_count{{model="tiny"}}']) == 3
    busy = ('tqdit_waiting_images{model="tiny"}', 'tqdit_running_images{model="tiny"}')
    # an answer goes out a moment before its row is free
    wait_until(lambda: not any(float(metrics(running)[name]) for name in busy))
    assert float(lines['tqdit_places{model="tiny"}']) == 16
    for route, status in ((GENERATIONS, 200), (GENERATIONS, 400), ("none", 404)):
        assert float(lines[f'tqdit_answers_total{{route="{route}",status="{status}"}}']) == 1


@pytest.mark.parametrize(
    ("host", "status"), [("a.example", 421), ("localhost.a.example:80", 421), ("127.0.0.1:x", 421),
                         ("LOCALHOST:81", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("", 200)]
)  # fmt: skip
def test_a_name_that_leads_here_is_answered_only_if_it_is_ours(local, host, status):
    for path in ("/v1/models", "/", "/health/live"):
        answer = local.ask(path, Host=host)
        assert answer.status == status
        assert status == 200 or answer.error["code"] == "wrong_host"
    assert "421" in local.ask("/openapi.json", Host="localhost").json["paths"]["/v1/models"]["get"]["responses"]


@pytest.fixture(scope="module")
def local(serve, bundle):
    return serve(settings=Settings(hosts=LOCAL), tiny=bundle)
