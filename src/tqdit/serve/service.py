"""A running service: its engines, jobs and numbers, and how it ends."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import multiprocessing
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tqdit.errors import UsageError
from tqdit.serve.engines import Order, ServedEngine
from tqdit.serve.jobs import ImageJob, KeptJobs
from tqdit.serve.metrics import ServerMetrics
from tqdit.serve.refusals import Refusal
from tqdit.serve.settings import Settings
from tqdit.serve.shapes import Health, ImageRequest

log = logging.getLogger("tqdit.serve")


class Service:
    """Engines by name, in one process. `drain` and `close` end it."""

    def __init__(self, engines: Mapping[str, ServedEngine], settings: Settings) -> None:
        self.engines, self.settings = dict(engines), settings
        self.jobs, self.metrics = KeptJobs(settings), ServerMetrics(self.engines.values())
        self.is_draining = False
        self.keeps_jobs = settings.keeps_jobs
        if self.keeps_jobs is None:
            self.keeps_jobs = multiprocessing.parent_process() is None
            if not self.keeps_jobs:
                log.warning(
                    "a child process may have siblings, so jobs and url are refused; keeps_jobs=True keeps them"
                )
        self._closers = ThreadPoolExecutor(2 * max(len(engines), 1), "tqdit-closer")  # one that drains, one that stops
        self._hurried = asyncio.Event()
        self._starting: set[asyncio.Task[Any]] = set()  # of requests that are being prepared
        self._working: set[ImageJob] = set()
        self._key = None if settings.api_key is None else _digest(settings.api_key.encode())

    @classmethod
    def open(cls, paths: Mapping[str, str | Path], settings: Settings) -> Service:
        """Open every engine, or none. Raises TqditError naming the first that cannot be served."""
        if not paths:
            raise UsageError("no engine is named. Pass at least one folder that tqdit-build wrote.")
        for name in paths:
            if not re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII):
                raise UsageError(f"'{name}' is no name for an engine; expected letters, digits, '.', '-' and '_'.")
        with ExitStack() as stack:
            engines = {}
            for name, path in paths.items():
                engines[name] = ServedEngine.open(name, Path(path), settings)
                stack.callback(engines[name].batcher.close, drain=False)
            service = cls(engines, settings)
            stack.pop_all()
        return service

    def check_process(self) -> None:
        """Raises BackendError in a fork of the process that opened the engines, as of gunicorn --preload."""
        for engine in self.engines.values():
            engine.batcher.stats()

    def check_key(self, authorization: str | None) -> None:
        """Raises Refusal unless a request shows the API key; compares in constant time."""
        if self._key is None:
            return
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip().encode()), self._key):
            message = "no or a wrong API key. Send the header 'Authorization: Bearer KEY'."
            raise Refusal(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})

    def check_host(self, host: str) -> None:
        """Raises Refusal if a browser was led here by another name, as by a web page whose own name changes address."""
        known = self.settings.hosts
        if host and known and re.sub(r":\d*$", "", host.lower()) not in known:
            raise Refusal(421, "wrong_host", f"this server is not '{host:.60}'; it answers to {', '.join(known)}.")

    def engine(self, name: str | None) -> ServedEngine:
        """The engine of this name, or the first. Raises Refusal if there is none."""
        if name is None:
            return next(iter(self.engines.values()))
        if name not in self.engines:
            raise Refusal(404, "unknown_model", f"no model '{name:.60}'; known are {', '.join(self.engines)}.", "model")
        return self.engines[name]

    async def start(self, asked: ImageRequest) -> ImageJob:
        """Check a request and queue its images. Raises Refusal or UsageError."""
        engine, began = self.engine(asked.model), time.monotonic()
        self._check_open(engine)
        if asked.response_format == "url":
            self.check_keeps_jobs()
        with engine.reserve(asked.n or 1, self.settings.most_images), self._starts():
            order: Order = await engine.order(asked, self.settings)
        self._check_open(engine)
        job = ImageJob(order, began, self.settings.deadline_s, self.metrics.ended)
        self._working.add(job)
        job.task.add_done_callback(lambda _: self._working.discard(job))
        return job

    @contextmanager
    def _starts(self) -> Iterator[None]:
        """Inside, the current task is one that `drain` ends. Raises Refusal if it does."""
        task = asyncio.current_task()
        assert task is not None
        self._starting.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if self.is_draining:
                raise _shutting_down() from None
            raise
        finally:
            self._starting.discard(task)

    def check_keeps_jobs(self) -> None:
        """Raises Refusal if the next request may reach another process."""
        if not self.keeps_jobs:
            message = "this server keeps nothing, since another process may get the next request. Ask for b64_json."
            raise Refusal(400, "invalid_value", message, "response_format")

    def _check_open(self, engine: ServedEngine) -> None:
        if self.is_draining or not engine.batcher.is_open:
            raise _shutting_down()

    def health(self) -> Health:
        """Whether it takes requests, and can answer them."""
        if self.is_draining:
            return Health("shutting_down")
        for engine in self.engines.values():
            if not engine.batcher.is_open:
                return Health("engine_stopped", engine.name)
            if engine.fails:
                return Health("engine_fails", engine.name)
        return Health("ok")

    async def drain(self, seconds: float) -> None:
        """Take no more requests; finish within a time those that a client waits for, and fail the others."""
        self.is_draining = True
        for task in [*self._starting]:
            task.cancel()
        for job in self.jobs:
            if not job.is_watched:  # nobody could fetch its images
                job.cancel()
        closing = self._close_engines(drain=True)
        hurried: asyncio.Future[Any] = asyncio.create_task(self._hurried.wait())
        await asyncio.wait({closing, hurried}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not closing.done():  # answer what is left, without waiting for the engine call in progress
            for job in [*self._working]:
                job.fail(_shutting_down())
        await self.close()
        await closing

    def hurry(self) -> None:
        """End a `drain` now."""
        self._hurried.set()

    async def close(self) -> None:
        """Fail what is not done, and close the engines; may be called twice."""
        self.is_draining = True
        await self._close_engines(drain=False)

    def _close_engines(self, drain: bool) -> asyncio.Future[Any]:
        loop, batchers = asyncio.get_running_loop(), [each.batcher for each in self.engines.values()]
        return asyncio.gather(*(loop.run_in_executor(self._closers, each.close, drain) for each in batchers))


def _shutting_down() -> Refusal:
    return Refusal(503, "shutting_down", "the server takes no more requests.", headers={"Connection": "close"})


def _digest(key: bytes) -> bytes:
    """Of one length for keys of any."""
    return hashlib.sha256(key).digest()
