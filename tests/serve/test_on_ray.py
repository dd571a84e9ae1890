"""Ray Serve: replicas that answer like one server, and what they refuse. Needs ray[serve], which CI has not."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from tqdit import Sampler
from tqdit.errors import UsageError
from tqdit.serve.on_ray import Replicas

HAS_RAY_SERVE = all(find_spec(library) for library in ("ray", "grpc", "fastapi"))


def call(address, path, body=None):
    """Status and JSON of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def address(bundle):
    """Of two replicas on a cluster of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tqdit", "serve", f"toy={bundle}", "--ray", "--replicas", "2", "--port", str(port),
               "--batch", "1", "--queue", "1"]  # fmt: skip
    server = subprocess.Popen(command, env={**os.environ, "RAY_DEDUP_LOGS": "0"}, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while True:
            try:
                if call(address, "/health/ready")[0] == 200:
                    break
            except (OSError, ValueError):  # nothing listens, or the proxy has no application yet
                pass
            assert server.poll() is None
            assert time.monotonic() < end
            time.sleep(0.5)
        yield address
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(not HAS_RAY_SERVE, reason="Ray Serve is not installed: pip install 'ray[serve]' (110 MB)")
def test_replicas_make_the_images_of_the_sampler_and_keep_no_jobs(address, bundle):
    with Sampler.open(bundle) as sampler:
        expected = sampler.sample([1], seed=5, steps=4)[0]
    for _ in range(4):  # whichever replica answers
        status, answer = call(address, "/v1/images/generations", {"class": 1, "seed": 5, "steps": 4})
        assert status == 200
        png = base64.b64decode(answer["data"][0]["b64_json"])
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), expected)
    for path, body in (("/v1/jobs", {"class": 1}), ("/v1/images/generations", {"class": 1, "response_format": "url"})):
        status, answer = call(address, path, body)
        assert status == 400
        assert "b64_json" in answer["error"]["message"]
    assert call(address, "/v1/models")[1]["data"][0]["id"] == "toy"
    long = {"class": 1, "steps": 1000}
    with ThreadPoolExecutor(16) as clients:  # for four places
        found = list(clients.map(lambda _: call(address, "/v1/images/generations", long), range(16)))
    refused = [answer["error"]["code"] for status, answer in found if status == 429]
    assert [status for status, _ in found].count(200) + len(refused) == 16
    assert set(refused) == {"queue_full"}


@pytest.mark.parametrize(
    ("numbers", "named"),
    [({"least": 0}, "--replicas is 0"), ({"least": 4, "most": 3}, "--max-replicas is 3"), ({"most": 10**9}, "--max")],
)
def test_impossible_replicas_are_refused(numbers, named):
    with pytest.raises(UsageError, match=named):
        Replicas(**numbers)
