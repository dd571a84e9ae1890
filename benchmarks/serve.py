"""tqdit-serve under load, on this machine's loopback alone.

    python benchmarks/serve.py model.engine [--parts throughput,latency,soak,hostile,start] [--json serve.json]

- throughput: --clients clients that ask for one image after another, against `Sampler.sample` at batch 16. Both do so
  in turn, --rounds times, with the server idle while `Sampler` works. Target: 0.95 of `Sampler`.
- latency: requests arrive at random times (Poisson) at parts of the rate that the clients reached.
- soak: for --minutes, requests, jobs, streams, cancels, wrong requests and clients that leave. Every image is compared
  with that of `Sampler`. Targets: no request lost, memory after the first quarter within 5 %.
- hostile: 200 requests that are oversized, slow, malformed, or tricks. Target: each gets one line with a status of 4xx.
- start: from the command to the listening server, and to the first image of 20 steps.

The server is the command in a process of its own. The engine must be one of classes. It ends with 1 if the soak or the
hostile requests miss their targets.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from hostile import hostile
from PIL import Image

from tqdit import __version__
from tqdit.engines.run.sampler import Sampler

GENERATIONS = "/v1/images/generations"
PARTS = ("start", "throughput", "latency", "hostile", "soak")
LOADS = (0.25, 0.5, 0.75, 0.9)  # of the clients' rate
HOSTILE = 200
SLOW = 10  # of them, which take as long as the server waits for a client
SEEDS = 8  # of the soak, for each class: so many images are compared
GROWTH = 0.05
HANG_S = 300.0


class Server:
    """`tqdit-serve ENGINE` in a process, on a free port."""

    def __init__(self, args: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "tqdit", "serve", f"bench={args.engine}", "--port", "0", "--queue", "64"]
        if args.threads is not None:
            command += ["--threads", str(args.threads)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.match(r"http://127\.0\.0\.1:(\d+)$", line.strip()):
                self.port = int(found[1])
                break
        else:
            raise SystemExit("the server did not start")
        self._rest = threading.Thread(target=self.process.stderr.read, daemon=True)  # or its pipe would fill
        self._rest.start()

    def memory(self) -> int:
        """Bytes that only this process holds."""
        return int(psutil.Process(self.process.pid).memory_full_info().uss)

    def ask(self, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
        """Status and content, of JSON what it says."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG_S)
        with contextlib.closing(connection):
            data = None if body is None else json.dumps(body)
            kind = {"Content-Type": "application/json"}
            connection.request(method or ("GET" if body is None else "POST"), path, data, kind)
            answer = connection.getresponse()
            content = answer.read()
        is_json = (answer.getheader("content-type") or "").startswith("application/json")
        return answer.status, json.loads(content) if is_json else content

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def pixels(data: dict[str, Any]) -> np.ndarray:
    """The first image of an answer."""
    with Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))) as image:
        return np.asarray(image)


def start(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds until it listens, and until the first image is there; the median of the rounds."""
    listening, first = [], []
    for _ in range(args.rounds):
        begun = time.perf_counter()
        with Server(args) as server:
            listening.append(time.perf_counter() - begun)
            status, _ = server.ask(GENERATIONS, {"class": 0, "steps": 20})
            first.append(time.perf_counter() - begun)
            assert status == 200
    return {"listening_s": statistics.median(listening), "first_image_s": statistics.median(first)}


def throughput(args: argparse.Namespace, server: Server, sampler: Sampler) -> dict[str, Any]:
    """Images per second of both, in turn."""
    sampler.sample([0] * sampler.batch, steps=2)
    rates: dict[str, list[float]] = {"sampler": [], "http": []}
    for number in range(args.rounds + 1):
        for name, work in (("sampler", sample_many), ("http", ask_many)):
            begun = time.perf_counter()
            work(args, server, sampler)
            if number:  # the first round warms both up
                rates[name].append(args.images / (time.perf_counter() - begun))
    ratios = [http / own for http, own in zip(rates["http"], rates["sampler"], strict=True)]
    return rates | {"ratio": statistics.median(ratios), "ratios": ratios}


def sample_many(args: argparse.Namespace, server: Server, sampler: Sampler) -> None:
    classes = sampler.card.signature.label.choices  # type: ignore[union-attr]
    sampler.sample(np.arange(args.images) % classes, seed=1, steps=args.steps)


def ask_many(args: argparse.Namespace, server: Server, sampler: Sampler) -> None:
    """Each client asks again when it has its image, on one connection."""
    classes = sampler.card.signature.label.choices  # type: ignore[union-attr]
    numbers = iter(range(args.images))
    lock = threading.Lock()

    def client(_: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=HANG_S)
        with contextlib.closing(connection):
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                body = json.dumps({"class": number % classes, "seed": number, "steps": args.steps})
                connection.request("POST", GENERATIONS, body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                assert answer.status == 200

    with ThreadPoolExecutor(args.clients) as pool:
        list(pool.map(client, range(args.clients)))


def latency(args: argparse.Namespace, server: Server, rate: float) -> list[dict[str, Any]]:
    """p50 and p99 of requests that arrive at random times, at parts of a rate (images per second)."""
    rows = []
    for load in LOADS:
        chance, seconds, refused = random.Random(0), [], 0
        with ThreadPoolExecutor(256) as pool:
            futures, at = [], time.perf_counter()
            until = at + args.seconds
            while at < until:
                time.sleep(max(0.0, at - time.perf_counter()))
                futures.append(pool.submit(timed, server, {"class": 0, "seed": len(futures), "steps": args.steps}, at))
                at += chance.expovariate(load * rate)
            for each in futures:
                status, took = each.result()
                refused += status != 200
                seconds += [took] if status == 200 else []
        p50, p99 = np.percentile(seconds, [50, 99])
        rows.append({"load": load, "per_s": load * rate, "p50_s": p50, "p99_s": p99, "images": len(seconds),
                     "refused": refused})  # fmt: skip
    return rows


def timed(server: Server, body: dict[str, Any], due: float) -> tuple[int, float]:
    """Status, and seconds since the request was due."""
    status, _ = server.ask(GENERATIONS, body)
    return status, time.perf_counter() - due


@dataclass
class Soak:
    """What clients of many kinds do at random, and what became of it."""

    server: Server
    steps: int
    classes: int
    expected: dict[tuple[int, int], np.ndarray]
    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def work(self, number: int, until: float) -> None:
        chance = random.Random(number)
        acts = [self.wait] * 8 + [self.job, self.cancel, self.leave, self.stream, self.wrong]
        while time.monotonic() < until:
            act = chance.choice(acts)
            try:
                self.counts[act(chance)] += 1
            except Exception as error:  # whatever it is, the request is lost
                self.lost.append(f"{act.__name__}: {type(error).__name__}: {error}")

    def body(self, chance: random.Random) -> dict[str, Any]:
        return {"class": chance.randrange(self.classes), "seed": chance.randrange(SEEDS), "steps": self.steps}

    def compare(self, body: dict[str, Any], answer: dict[str, Any]) -> str:
        right = np.array_equal(pixels(answer["data"][0]), self.expected[body["class"], body["seed"]])
        return "right" if right else "WRONG"

    def wait(self, chance: random.Random) -> str:
        status, answer = self.server.ask(GENERATIONS, body := self.body(chance))
        return self.compare(body, answer) if status == 200 else f"status {status}"

    def job(self, chance: random.Random) -> str:
        status, job = self.server.ask("/v1/jobs", body := self.body(chance))
        until = time.monotonic() + HANG_S
        while status in (200, 202) and job["status"] in ("queued", "in_progress"):
            assert time.monotonic() < until, "the job hangs"
            time.sleep(0.1)
            status, job = self.server.ask(f"/v1/jobs/{job['id']}")
        return f"status {status}" if status > 299 else f"job {self.compare(body, job['result'])}"

    def cancel(self, chance: random.Random) -> str:
        status, job = self.server.ask("/v1/jobs", self.body(chance))
        if status != 202:
            return f"status {status}"
        time.sleep(chance.random() * 0.3)
        status, _ = self.server.ask(f"/v1/jobs/{job['id']}", method="DELETE")
        return f"cancel {status}"

    def leave(self, chance: random.Random) -> str:
        body = json.dumps(self.body(chance) | {"stream": chance.random() < 0.5, "previews": 5}).encode()
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=HANG_S) as client:
            head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body[: chance.choice([5, None])])
            time.sleep(chance.random() * 0.3)
        return "left"

    def stream(self, chance: random.Random) -> str:
        body = self.body(chance)
        status, content = self.server.ask(GENERATIONS, body | {"stream": True, "previews": 5})
        if status != 200:
            return f"status {status}"
        events = [json.loads(line[6:]) for line in content.decode().splitlines() if line.startswith("data: ")]
        return f"stream {self.compare(body, {'data': [events[-1]]})}"

    def wrong(self, chance: random.Random) -> str:
        bodies = [
            {},
            {"class": 10**6},
            {"steps": 0},
            {"prompt": "?" * 5000},
            {"class": 0, "colour": 1},
            [],
            "x" * 20_000,
        ]
        status, answer = self.server.ask(GENERATIONS, chance.choice(bodies))
        assert 400 <= status < 500, status
        assert answer["error"]["message"]
        return "refused"


def soak(args: argparse.Namespace, server: Server, sampler: Sampler) -> dict[str, Any]:
    """Clients of all kinds for some minutes; memory after the first quarter and at the end."""
    classes = min(sampler.card.signature.label.choices, 4)  # type: ignore[union-attr,type-var]
    expected = {
        (label, seed): sampler.sample([label], seed=seed, steps=args.steps)[0]
        for label in range(classes) for seed in range(SEEDS)
    }  # fmt: skip
    state = Soak(server, args.steps, classes, expected)
    begun = time.monotonic()
    until = begun + 60 * args.minutes
    memory: list[tuple[float, int]] = []
    with ThreadPoolExecutor(args.clients) as pool:
        working = [pool.submit(state.work, number, until) for number in range(args.clients)]
        while time.monotonic() < until:
            time.sleep(min(1.0, args.minutes * 5))
            memory.append(((time.monotonic() - begun) / (until - begun), server.memory()))
        for each in working:
            each.result()
    early, late = (
        statistics.median(size for part, size in memory if low <= part <= high)
        for low, high in ((0.2, 0.3), (0.9, 1.1))
    )
    wrong = [name for name in state.counts if "WRONG" in name or name.startswith("status 5")]
    growth = late / early - 1
    return {"counts": dict(state.counts), "lost": state.lost, "memory_mb": early / 1e6, "growth": growth,
            "passed": not state.lost and not wrong and growth < GROWTH and state.counts["right"] > 0}  # fmt: skip


def first_answer(port: int, sent: bytes) -> tuple[int, bytes]:
    """Status and body of the first answer to what is sent; 0 if there is none."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        with contextlib.suppress(OSError):  # the server may close before it has all
            client.sendall(sent)
        with contextlib.suppress(OSError):
            answer = http.client.HTTPResponse(client)
            with contextlib.suppress(http.client.HTTPException), contextlib.closing(answer):
                answer.begin()
                return answer.status, answer.read()
    return 0, b""


def attack(port: int) -> dict[str, Any]:
    """Send all hostile requests: how many got each status, and those that are not answered as they should be."""

    def one(request: tuple[str, bytes]) -> tuple[int, str | None]:
        kind, sent = request
        status, body = first_answer(port, sent)
        try:
            message = json.loads(body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = ""
        right = 400 <= status < 500 and message and "\n" not in message and "Traceback" not in message
        return status, None if right else f"{kind}: status {status}, {body[:80]!r}"

    with ThreadPoolExecutor(SLOW + 6) as pool:
        found = list(pool.map(one, reversed(hostile(HOSTILE, SLOW))))
    statuses, failed = Counter(status for status, _ in found), [failure for _, failure in found if failure]
    alive = first_answer(port, b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200
    return {"requests": HOSTILE, "statuses": dict(sorted(statuses.items())), "failed": failed, "alive": alive,
            "passed": alive and not failed}  # fmt: skip


def show(name: str, facts: Any) -> None:
    if name == "latency":
        print("\n| load | requests per s | p50 | p99 | images | refused |\n|---|---|---|---|---|---|")
        for row in facts:
            print(f"| {row['load']:.0%} | {row['per_s']:.2f} | {row['p50_s']:.2f} s | {row['p99_s']:.2f} s | "
                  f"{row['images']} | {row['refused']} |")  # fmt: skip
    elif name == "throughput":
        own, http = (statistics.median(facts[each]) for each in ("sampler", "http"))
        print(f"throughput: Sampler {own:.2f} images/s, HTTP {http:.2f} images/s, ratio {facts['ratio']:.3f} "
              f"({', '.join(f'{each:.3f}' for each in facts['ratios'])})")  # fmt: skip
    elif name == "start":
        print(f"start: listens after {facts['listening_s']:.2f} s, first image after {facts['first_image_s']:.2f} s")
    elif name == "hostile":
        counts = ", ".join(f"{count} times {status}" for status, count in facts["statuses"].items())
        right = facts["requests"] - len(facts["failed"])
        print(f"hostile: {right} of {facts['requests']} answered with 4xx ({counts})")
        print(*facts["failed"], sep="\n", end="\n" * bool(facts["failed"]))
    else:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(facts["counts"].items()))
        grown = f"memory {facts['memory_mb']:.0f} MB, grown {facts['growth']:.1%}"
        print(f"soak: {counts}; {len(facts['lost'])} lost; {grown}")
        print(*facts["lost"][:10], sep="\n", end="\n" * bool(facts["lost"]))
    sys.stdout.flush()


def measure(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Each part with its numbers."""
    if "start" in args.parts:
        yield "start", start(args)
    with Server(args) as server, Sampler.open(args.engine, threads=args.threads) as sampler:
        rate = args.rate
        if "throughput" in args.parts or ("latency" in args.parts and rate is None):
            found = throughput(args, server, sampler)
            rate = statistics.median(found["http"])
            yield "throughput", found
        works: dict[str, Callable[[], Any]] = {
            "latency": lambda: latency(args, server, rate), "hostile": lambda: attack(server.port),
            "soak": lambda: soak(args, server, sampler),
        }  # fmt: skip
        for name, work in works.items():
            if name in args.parts:
                yield name, work()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("engine", type=Path, nargs="?", default=Path("model.engine"), help="default: %(default)s")
    add("--parts", type=lambda text: text.split(","), default=PARTS, help=f"default: {','.join(PARTS)}")
    add("--clients", type=int, default=16, help="at the same time (default: %(default)s)")
    add("--images", type=int, default=64, help="of each round of the throughput (default: %(default)s)")
    add("--steps", type=int, default=50, help="default: %(default)s")
    add("--rounds", type=int, default=5, help="default: %(default)s")
    add("--seconds", type=float, default=60, help="of each load of the latency (default: %(default)s)")
    add("--rate", type=float, help="images per second that loads are parts of (default: what the clients reached)")
    add("--minutes", type=float, default=10, help="of the soak (default: %(default)s)")
    add("--threads", type=int, help="CPU threads of the engine, in the server and in Sampler")
    add("--json", type=Path, help="write the numbers there, too")
    args = parser.parse_args()
    results = {}
    for name, facts in measure(args):
        results[name] = facts
        show(name, facts)
    if args.json is not None:
        machine = {"cpus": os.cpu_count(), "python": sys.version.split()[0], "tqdit": __version__}
        facts = {"settings": vars(args), "machine": machine, **results}
        args.json.write_text(json.dumps(facts, indent=1, default=str) + "\n")
    return 0 if all(results[name]["passed"] for name in ("hostile", "soak") if name in results) else 1


if __name__ == "__main__":
    sys.exit(main())
