"""A server in a thread, and clients of it."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from support import wait_until
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.step_batcher import StepBatcher
from tqdit.errors import FileFormatError, UsageError
from tqdit.ports import Port
from tqdit.serve.app import application
from tqdit.serve.engines import ServedEngine
from tqdit.serve.server import Server
from tqdit.serve.service import Service
from tqdit.serve.settings import Settings

DEFAULTS = Settings()
GENERATIONS = "/v1/images/generations"
HEAD = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()


class Client:
    """It asks a server at an address."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> Answer:
        """Send JSON, or bytes as they are."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer)
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error)


class Running(Client):
    """A service behind a socket on this machine."""

    def __init__(self, app: Any) -> None:
        self.service: Service = app.state.service
        self.server = Server(app, "127.0.0.1", 0)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        wait_until(lambda: self.server.started or not self.thread.is_alive())
        assert self.thread.is_alive()
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        super().__init__(f"http://127.0.0.1:{self.port}")

    @contextlib.contextmanager
    def streaming(self, path: str, body: Any = None) -> Iterator[Iterator[tuple[str, Any]]]:
        """The events of a request, as (name, data); leaving the block closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        try:
            yield _events(answer)
        finally:
            answer.close()
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def running(self) -> int:
        """Images that are waiting or in work."""
        stats = [engine.batcher.stats() for engine in self.service.engines.values()]
        return sum(each.waiting + each.running for each in stats)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


class Answer:
    """status, headers, content, and JSON if it is some."""

    def __init__(self, answer: Any) -> None:
        self.status, self.headers, self.content = answer.status, answer.headers, answer.read()
        self.kind = answer.headers.get_content_type()

    @property
    def json(self) -> Any:
        assert self.kind == "application/json", self.content
        return json.loads(self.content)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's shape, one line, without what is the machine's own."""
        assert self.status >= 400, self.content
        (error,) = [self.json["error"]]
        assert set(error) == {"message", "type", "param", "code"}
        assert set(self.json) == {"error"}
        assert 0 < len(error["message"]) < 700
        for part in ("\n", "Traceback", "/tmp", ".py", "site-packages"):
            assert part not in error["message"]
        return error


def _events(answer: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
    name = None
    for line in answer:
        kind, _, rest = line.decode().rstrip("\n").partition(": ")
        if kind == "event":
            name = rest
        elif kind == "data":
            yield str(name), json.loads(rest)


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def toy_service(
    card: Any, network: Any, settings: Any, kind: str = "class", batch: int = 4, decoder: Any = None
) -> Any:
    """The application of one engine, named toy, whose network is a function."""
    name = "toy"
    batcher = StepBatcher(Sampler(card, network, decoder, batch=batch), queue=settings.queue)
    manifest = type("Manifest", (), {"precision": "fp32", "backend": "toy", "decoder": None})()
    return application(Service({name: ServedEngine(name, batcher, kind, manifest)}, settings))  # type: ignore[arg-type]


def echo(card: Any, port: str) -> Any:
    """A network whose prediction shows the request's value."""

    def predict(inputs: Any) -> np.ndarray:
        rows = np.asarray(inputs[port], np.float32).reshape(len(inputs[port]), -1)[:, :1]
        return np.zeros((len(rows), *card.signature.output_shape), np.float32) + rows[..., None, None] / 8

    return predict


def text_app(manifest: Any, settings: Any = DEFAULTS, batch: int = 4, before: Any = lambda: None) -> Any:
    """An engine of text whose encoder counts letters; it calls `before` first."""
    ports = [port for port in manifest.card.signature.ports if port.kind != "request"]
    ports.append(Port("text", "request", "float32", (None, 2), null=0.0))
    card = replace(manifest.card, signature=replace(manifest.card.signature, ports=tuple(ports)))
    app = toy_service(card, echo(card, "text"), settings, "text", batch)

    def encode(prompts: Any) -> Any:
        before()
        if any(len(prompt) > 20 for prompt in prompts):
            raise UsageError(f"a prompt has {len(prompts[0])} tokens, the engine takes 20.")
        if "broken" in prompts:
            raise FileFormatError("/tmp/x/text.onnx: does not run.")
        return {"text": np.array([[len(prompt), 0] for prompt in prompts], np.float32)}

    app.state.service.engines["toy"].batcher.sampler.encode = encode
    return app
