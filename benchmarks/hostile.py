"""Requests that no friend would send to an image server; benchmarks/serve.py sends them, and a test does."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

HOST = b"Host: localhost\r\n"  # another name would be refused before anything else is looked at
POST = b"POST /v1/images/generations HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"  # lacks its end
ODD = [0, 9, 0x202E, 0x1F600, 0x10FFFF, 0xFFFD, 0x41]  # characters: null, tab, right-to-left, emoji and others
SLOW = {"slow: half a head": POST[:30], "slow: half a body": POST + b"Content-Length: 50\r\n\r\n{"}
Bytes = Callable[[random.Random], bytes]


def noise(chance: random.Random) -> bytes:
    return bytes(chance.randrange(256) for _ in range(chance.randrange(1, 200)))


def odd_text(chance: random.Random) -> str:
    return "".join(chr(chance.choice(ODD)) for _ in range(50))


BODIES: dict[str, Bytes] = {
    "not JSON": lambda chance: b"?" + noise(chance),
    "nested": lambda _: b"[" * 15_000,
    "nested in a field": lambda _: b'{"class":' + b'{"a":' * 3000,
    "oversized": lambda chance: b" " * chance.randrange(65_537, 3_000_000),
    "a long integer": lambda _: b'{"class": %s}' % (b"9" * 9000),
    "a long fraction": lambda _: b'{"class": 0, "guidance_scale": 0.%s}' % (b"9" * 9000) + b"x",
    "unicode": lambda chance: json.dumps({"prompt": odd_text(chance)}).encode(),
    "surrogates": lambda _: b'{"prompt": "\\ud800\\udfff\\ud800"}',
    "not a number": lambda _: b'{"class": 0, "guidance_scale": NaN}',
    "huge": lambda _: b'{"class": 0, "steps": 1e308}',
    "unknown field": lambda chance: json.dumps({"class": 0, odd_text(chance): 1}).encode(),
    "two roots": lambda _: b'{"class": 0}{"class": 0}',
    "a path": lambda _: b'{"model": "../../../etc/passwd", "class": 0}',
    "nothing": lambda _: b"",
    "null bytes": lambda _: b'{"prompt": "\x00\x01"}',
    "too many": lambda _: b'{"class": 0, "n": 1000000000}',
    "a list": lambda _: b'[{"class": 0}]',
}
PATHS = (
    "/../../etc/passwd", "/v1/images/..%2f..%2f/0.png", "/%00", "//x", "/v1/jobs/%F0%9F%98%80", "/v1/models/%2e%2e",
    "/" + "a" * 8000, "/v1/images/" + "9" * 7000 + "/0.png", "/page.html", "/v1/jobs/x/events?a=" + "b" * 5000,
)  # fmt: skip
HEADS: dict[str, Bytes] = {
    "no HTTP": lambda chance: b"?" + noise(chance) + b"\r\n\r\n",
    "no host": lambda _: b"GET / HTTP/1.1\r\n\r\n",
    "TLS": lambda chance: b"\x16\x03\x01" + noise(chance) + b"\r\n\r\n",
    "two lengths": lambda _: POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "length and chunks": lambda _: POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bad chunk": lambda _: POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "headers without end": lambda _: b"GET / HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 30_000,
    "a split header": lambda _: b"GET / HTTP/1.1\r\n" + HOST + b"X: a\rb\r\n\r\n",
    "odd method": lambda _: b"BREW / HTTP/1.1\r\n" + HOST + b"\r\n",
    "odd upgrade": lambda _: b"POST / HTTP/1.1\r\n" + HOST + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n",
}


def hostile(count: int, slow: int, seed: int = 0) -> list[tuple[str, bytes]]:
    """So many requests, each with its kind: bodies, paths and heads in turn; at last `slow` ones that stop midway."""
    chance = random.Random(seed)
    kinds: list[tuple[str, bytes]] = []
    for number in range(count - slow):
        turn, family = divmod(number, 3)
        if family == 0:
            kind = list(BODIES)[turn % len(BODIES)]
            body = BODIES[kind](chance)
            kinds.append((kind, POST + b"Content-Length: %d\r\n\r\n" % len(body) + body))
        elif family == 1:
            path = PATHS[turn % len(PATHS)]
            kinds.append((f"path {path[:24]}", f"GET {path} HTTP/1.1\r\n".encode() + HOST + b"\r\n"))
        else:
            kind = list(HEADS)[turn % len(HEADS)]
            kinds.append((kind, HEADS[kind](chance)))
    return kinds + [list(SLOW.items())[number % len(SLOW)] for number in range(slow)]
