"""examples/http_service.py and the commands of its guide, over a real socket."""

import contextlib
import importlib.util
import io
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image

from tqdit.engines.run.sampler import Sampler

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("http_service", ROOT / "examples" / "http_service.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["http_service"] = module  # its dataclass looks there for its types
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def serve(example):
    """serve(engine, ...) -> address of a running service."""
    running = []

    def start(engine, **options):
        server = uvicorn.Server(
            uvicorn.Config(example.make_app(str(engine), **options), port=0, log_level="error", **example.SERVER)
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def ask(url, method="GET", body=None):
    """Status and content, JSON decoded."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            status, content, kind = answer.status, answer.read(), answer.headers.get_content_type()
    except urllib.error.HTTPError as error:
        with error:
            status, content, kind = error.code, error.read(), error.headers.get_content_type()
    return status, json.loads(content) if kind == "application/json" and content else content


@pytest.fixture(scope="module")
def quick(serve, bundle):
    return serve(bundle)


@pytest.fixture(scope="module")
def slow(serve, bundle_of):
    return serve(bundle_of(steps=1000), batch=1, queue=0)


def wait_for(address, name):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        state = ask(f"{address}/images/{name}")[1]
        if state["state"] not in ("waiting", "working"):
            return state
        time.sleep(0.02)
    raise AssertionError(state)


def test_a_requested_image_is_that_of_the_sampler(quick, bundle):
    status, answer = ask(f"{quick}/images", "POST", {"class": 3, "seed": 7, "guidance_scale": 2.0})
    assert status == 202
    assert wait_for(quick, answer["id"]) == {"state": "done"}
    status, content = ask(f"{quick}/images/{answer['id']}.png")
    assert status == 200
    with Sampler.open(bundle) as sampler:
        expected = sampler.sample([3], 2.0, seed=7)[0]
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_steps_and_sampler_are_chosen_per_request(quick, bundle):
    body = {"class": 3, "seed": 7, "steps": 5, "sampler": "ddim"}
    name = ask(f"{quick}/images", "POST", body)[1]["id"]
    assert wait_for(quick, name) == {"state": "done"}
    with Sampler.open(bundle) as sampler:
        expected = sampler.sample([3], seed=7, steps=5, sampler="ddim")[0]
    with Image.open(io.BytesIO(ask(f"{quick}/images/{name}.png")[1])) as image:
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_progress_is_reported_and_a_cancelled_request_frees_its_place(slow):
    name = ask(f"{slow}/images", "POST", {"class": 1})[1]["id"]
    until, state = time.monotonic() + 30, {}
    while state.get("step", 0) < 2 and time.monotonic() < until:
        state = ask(f"{slow}/images/{name}")[1]
    assert state["state"] == "working"
    assert 2 <= state["step"] <= state["steps"] == 1000
    assert ask(f"{slow}/images/{name}.png")[0] == 409
    status, answer = ask(f"{slow}/images", "POST", {"class": 2})  # one row, no queue
    assert status == 503
    assert "unfinished" in answer["error"]
    assert ask(f"{slow}/images/{name}", "DELETE")[0] == 204
    assert ask(f"{slow}/images/{name}")[0] == 404
    while ask(f"{slow}/health")[1]["running"] and time.monotonic() < until:
        time.sleep(0.01)
    name = ask(f"{slow}/images", "POST", {"class": 2})[1]["id"]
    assert ask(f"{slow}/images/{name}", "DELETE")[0] == 204


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 16_000,
        b'{"class":' + b"[" * 16_000,
        [],
        {},
        3,
        {"class": 99},
        {"class": "x"},
        {"class": "3"},
        {"class": True},
        {"class": 3.5},
        {"class": None},
        {"class": 0, "seed": -1},
        {"class": 0, "seed": 10**30},
        {"class": 0, "steps": 0},
        {"class": 0, "steps": "x"},
        {"class": 0, "sampler": "x"},
        {"class": 0, "guidance_scale": "4"},
        {"class": 0, "guidance_scale": True},
        b'{"class": 0, "guidance_scale": NaN}',
        b'{"class": 0, "guidance_scale": 1e999}',
        {"class": 0, "guidance": 4},
    ],
    ids=lambda body: str(body)[:40],
)
def test_a_bad_request_is_told_so(quick, body):
    status, answer = ask(f"{quick}/images", "POST", body)
    assert status == 400
    assert answer["error"]


def test_a_misspelt_request_is_told_the_field_and_shown_a_right_one(quick):
    error = ask(f"{quick}/images", "POST", {"class": 0, "guidance": 4})[1]["error"]
    assert "guidance" in error
    assert '{"class": 3, "seed": 7}' in error


def connected(address):
    return socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])), timeout=20)


HEAD = b"POST /images HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize("head", [b"Content-Length: 600000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
def test_a_body_that_is_too_large_is_refused_before_it_is_all_there(quick, head):
    with connected(quick) as client:
        client.sendall(HEAD + head + (b"5000\r\n" if b"chunked" in head else b"") + b" " * 0x5000)
        assert client.recv(1000).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "sent", [b"", b"POST /ima", HEAD + b"Content-Length: 99\r\n\r\n{", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /"],
    ids=["nothing", "half a head", "half a body", "half a second request"],
)  # fmt: skip
def test_a_client_that_stalls_is_disconnected(quick, example, monkeypatch, sent):
    logged = []
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "error", lambda *args, **_: logged.append(args))
    monkeypatch.setattr(example, "ANSWER_SECONDS", 0.3)
    with connected(quick) as client:
        client.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            while client.recv(1000):
                pass
    assert ask(f"{quick}/health")[0] == 200
    assert not logged


def test_the_number_of_connections_is_bounded(quick, example, monkeypatch):
    monkeypatch.setattr(example, "CONNECTIONS", 2)
    with connected(quick) as first, connected(quick) as second:
        for client in (first, second):
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        with connected(quick) as third, contextlib.suppress(ConnectionResetError):
            assert third.recv(1000) == b""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            assert ask(f"{quick}/health")[0] == 200
            return
    raise AssertionError("no connection is free again")


def test_the_names_of_images_cannot_be_guessed(quick):
    names = {ask(f"{quick}/images", "POST", {"class": 1, "steps": 2})[1]["id"] for _ in range(2)}
    assert len(names) == 2
    assert all(re.fullmatch(r"[\w-]{22}", name) for name in names)


def test_an_engine_that_is_not_there_is_one_line(example, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["http_service.py", str(tmp_path / "x.engine")])
    with pytest.raises(SystemExit, match="2"):
        example.main()
    assert "x.engine: no such engine. Run tqdit-build first." in capsys.readouterr().err


def test_an_unknown_image_is_not_found(quick):
    for path, method in (("999", "GET"), ("999.png", "GET"), ("999", "DELETE")):
        assert ask(f"{quick}/images/{path}", method)[0] == 404


def test_the_shell_commands_of_the_guide_run(quick, tmp_path):
    """The block with curl, in one shell, at this service's address."""
    guide = (ROOT / "docs" / "guides" / "http-service.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(.*?)```", guide, re.DOTALL)
    script = "set -e\n" + block.replace("http://127.0.0.1:8000", quick)
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (8, 8)
