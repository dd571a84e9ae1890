"""Step-level batching for servers: requests that arrive at any time share each engine call, whatever their steps."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from tqdit.engines.gpu import GpuChoice
from tqdit.engines.process import Process
from tqdit.engines.run.sampler import Sampler
from tqdit.errors import DeadlineError, QueueFullError, SamplingError, SamplingStopped, TqditError, UsageError
from tqdit.ports import check_request
from tqdit.sampling.chains import Chains
from tqdit.sampling.guidance import check_scale
from tqdit.sampling.noise import check_key
from tqdit.sampling.schedule import ChainArguments, Schedule


@dataclass(frozen=True)
class Progress:
    """What a request's callback is told after each of its steps."""

    step: int  # the one that has just been computed; 0 is the last
    steps: int  # of the request's chain
    x: NDArray[np.float32] | None  # a copy of its state, at every `preview_every`-th step


ProgressCallback = Callable[[Progress], bool | None]
Result = NDArray[Any]  # uint8 (H, W, 3), or the float32 state of a model without pictures


@dataclass(frozen=True)
class BatcherStats:
    """A moment of a batcher, for a server's metrics."""

    waiting: int  # requests that have not begun
    running: int  # requests that take part in every full engine call
    engine_calls: int  # so far, forecasts among them
    steps: int  # of all requests in those calls; steps / engine_calls is the mean number of images per call


class _Request(Future[Result]):
    """One image to be made, and the future that its owner holds.

    It stays pending until it is done, so that it can be cancelled while it runs.
    """

    def __init__(
        self,
        batcher: StepBatcher,
        schedule: Schedule,
        ports: dict[str, NDArray[Any]],
        scale: float,
        seed: int,
        image: int,
    ) -> None:
        super().__init__()
        self.schedule, self.ports, self.scale, self.seed, self.image = schedule, ports, scale, seed, image
        self.expires = math.inf  # time.monotonic(), in seconds
        self.callback: ProgressCallback | None = None
        self.preview_every = 0
        self._batcher = batcher
        self._notifying = threading.Lock()  # taken once, by the thread that notifies the waiters of a cancellation
        _PENDING.add(self)

    def cancel(self) -> bool:
        if not self.done():
            self._batcher._forget(self)
        cancelled = super().cancel()
        if cancelled:
            _PENDING.discard(self)
        if cancelled and self._notifying.acquire(blocking=False):
            self.set_running_or_notify_cancel()  # for concurrent.futures.wait; a second call fails
        return cancelled


_PENDING: weakref.WeakSet[_Request] = weakref.WeakSet()  # of every batcher; with those whose result was set just now


def _fail_in_fork() -> None:
    """Fail the unfinished images of a fork, which no thread of it makes: whoever waits for one is told at once."""
    for request in list(_PENDING):
        Future.__init__(request)  # without callbacks, and with a lock that no other thread holds
        request.set_exception(request._batcher._process.refusal("image"))
    _PENDING.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
    os.register_at_fork(after_in_child=_fail_in_fork)


class StepBatcher:
    """Runs many requests on one engine; requests at different steps share every call. Thread-safe.

        with StepBatcher("model.engine", batch=16) as batcher:
            future = batcher.submit(3, seed=7)
            image = future.result()  # uint8 (H, W, 3)

    A request begins at the next step after there is a place in the batch, in the order of arrival, and keeps its place
    until its image is done. Every running request takes part in every full call; those that forecast make these steps
    between two full calls, apart from the others. The image is that of `Sampler.sample` for
    the same request, guidance scale, seed, steps and sampler with first_image=image_index, bit for bit on one CPU
    backend.

    One thread makes the engine calls, decodes and runs the callbacks, so a slow callback delays all requests. States
    exist only for running requests, in buffers that are allocated once.
    """

    def __init__(
        self, sampler: Sampler | str | Path, *, batch: int | None = None, queue: int = 256, threads: int | None = None,
        device: GpuChoice = None,
    ) -> None:  # fmt: skip
        """sampler: an open one, which stays the caller's to close, or the path of a bundle, which this object opens
        and closes. batch: images per engine call at most; None: as many as `Sampler.open` chooses. queue: how many
        requests may wait for a place. threads: CPU threads, device: index of the GPU (or a `GpuShare`) of an engine
        that is opened here.

        Raises UsageError for impossible numbers and, for a path, what `Sampler.open` raises.
        """
        if queue < 0 or (batch is not None and batch < 1):
            raise UsageError(f"batch is {batch} and queue {queue}; expected at least 1 and 0.")
        self._owns_sampler = not isinstance(sampler, Sampler)
        if not isinstance(sampler, Sampler):
            sampler = Sampler.open(sampler, batch=batch, threads=threads, device=device)
        elif threads is not None or device is not None:
            raise UsageError(
                "threads and device belong to an engine that is opened here; this sampler is open already."
            )
        self._sampler = sampler
        batch = sampler.batch if batch is None else batch
        if batch > sampler.batch:
            raise UsageError(
                f"batch is {batch}, the sampler was opened for {sampler.batch}. Open it with batch={batch}."
            )
        self.card = self._sampler.card
        self.batch = batch
        self.queue = queue
        card = self.card
        self._chains = Chains(card.signature, card.guidance, batch, card.correction)  # the worker's own, like the list
        self._running: list[_Request] = []  # one per chain
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[_Request] = deque()
        self._unfinished: set[_Request] = set()
        self._closing = False  # no new requests
        self._stopping = False  # and the old ones are not finished either
        self._calls = self._steps = 0
        self._process = Process()
        self._worker = threading.Thread(target=self._work, name="tqdit-step-batcher", daemon=True)
        # Finalizers run before the interpreter ends. A daemon thread that is inside an engine call then would crash.
        weakref.finalize(self, _close_at_exit, weakref.ref(self))
        self._worker.start()

    def submit(
        self,
        request: Any = None,
        *,
        guidance_scale: float | None = None,
        seed: int = 0,
        image_index: int = 0,
        deadline: float | None = None,
        on_progress: ProgressCallback | None = None,
        preview_every: int = 0,
        **chain: Unpack[ChainArguments],
    ) -> Future[Result]:
        """Queue one image and return at once; `future.result()` gives it, `asyncio.wrap_future(future)` awaits it.

        The result is a uint8 image (H, W, 3), or the float32 state of a latent model without a decoder.

        request: the class (0..num_classes, the last one is unconditional) for a class-conditional model, None for an
        unconditional one; in general a dict with one row for each request port. guidance_scale, chain: as for
        `Sampler.sample`.
        deadline: seconds from now, checked before every step. on_progress: called after each of the request's
        steps, on the batcher's thread; returning True stops the request. preview_every N: its Progress carries a copy
        of the state after every Nth step (`sampler.to_images` makes pictures of it).

        `future.cancel()` succeeds until the result is there: a waiting request is gone at once, a running one frees
        its place before the next step. `future.running()` is always False for this reason.

        Raises QueueFullError if no more requests are taken, UsageError for bad values and after `close`, BackendError
        in a fork of the batcher's process, where unfinished futures fail with it. The future fails with DeadlineError,
        SamplingError (NaN, or the engine's error as its cause), SamplingStopped (by the callback or by
        `close(drain=False)`) or whatever the callback raised.
        """
        self._process.check("batcher")
        ports = check_request(self.card.signature, request)
        scale = check_scale(self.card.guidance, guidance_scale)
        schedule = self._sampler.choose(**chain).schedule
        check_key(seed, image_index)
        if deadline is not None and not deadline > 0:
            raise UsageError(f"deadline is {deadline}; it counts seconds from now and must be above 0.")
        if preview_every < 0 or (preview_every and on_progress is None):
            raise UsageError(f"preview_every is {preview_every}; expected 0 or more, with an on_progress to call.")
        expires = math.inf if deadline is None else time.monotonic() + deadline
        queued = _Request(self, schedule, ports, scale, seed, image_index)
        queued.expires, queued.callback, queued.preview_every = expires, on_progress, preview_every
        with self._changed:
            if self._closing:
                raise UsageError("this batcher is closed. Make another one.")
            if len(self._unfinished) >= self.batch + self.queue:
                raise QueueFullError(
                    f"{len(self._unfinished)} requests are unfinished, the batcher takes {self.batch} running and "
                    f"{self.queue} waiting. Submit again when one is done, or make the queue longer."
                )
            self._unfinished.add(queued)
            self._waiting.append(queued)
            self._changed.notify_all()
        return queued

    @property
    def sampler(self) -> Sampler:
        """The sampler whose engine runs."""
        return self._sampler

    @property
    def is_open(self) -> bool:
        """Whether it takes requests: it was not closed, and its thread lives."""
        return not self._closing

    def stats(self) -> BatcherStats:
        self._process.check("batcher")
        with self._changed:
            return BatcherStats(len(self._waiting), len(self._running), self._calls, self._steps)

    def close(self, drain: bool = True) -> None:
        """Take no more requests, finish (`drain`) or fail the open ones, and end the thread; may be called twice.

        Waits for the thread, unless a callback calls it. drain=False: unfinished requests fail with
        SamplingStopped as soon as the engine call in progress returns; it overrides an earlier drain.
        """
        if not self._process.is_here:
            return  # the lock may be held by a thread that a fork does not have
        with self._changed:
            self._closing = True
            self._stopping = self._stopping or not drain
            self._changed.notify_all()
        if threading.current_thread() is not self._worker:
            self._worker.join()

    def __enter__(self) -> StepBatcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)

    # The worker's thread. Futures are resolved without the lock, since that runs their owners' callbacks.

    def _work(self) -> None:
        try:
            while self._between_steps():
                self._step()
        finally:
            with self._changed:
                self._closing = True
                left = [*self._running, *self._waiting]
                self._running.clear()
                self._waiting.clear()
            for request in left:
                self._resolve(request, SamplingStopped("the batcher was closed before this image was done."))
            if self._owns_sampler:
                self._sampler.close()

    def _between_steps(self) -> bool:
        """Free the places of cancelled and late requests and fill them from the queue; waits if there is nothing to do.

        False: the batcher was closed and nothing is left to finish.
        """
        now = time.monotonic()
        for place in reversed(range(len(self._running))):
            request = self._running[place]
            if request.cancelled():
                self._remove(place)
            elif request.expires <= now:
                steps = len(request.schedule.timesteps)
                done = steps - 1 - self._chains.step_of(place)
                self._remove(place)
                self._resolve(request, _late(f"after {done} of {steps} steps"))
        with self._changed:
            while not (self._waiting or self._running or self._closing):
                self._changed.wait()
            if self._stopping or not (self._waiting or self._running):
                return False
            now = time.monotonic()
            late = [request for request in self._waiting if request.expires <= now]
            for request in late:
                self._waiting.remove(request)
            free = self.batch - len(self._running)
            admitted = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            self._running += admitted
        for request in late:
            self._resolve(request, _late("before it began"))
        for request in admitted:
            self._chains.add(request.schedule, request.ports, request.scale, request.seed, request.image)
        return True

    def _step(self) -> None:
        """One engine call: a forecast for the requests whose next step is one, else a full call for all."""
        if not self._chains.count:
            return
        count = self._forecasts_first() or self._chains.count
        try:
            with self._chains.first(count):
                finite = self._chains.step(self._sampler.network)
        except BaseException as error:  # of any kind: the thread continues and the requests get the error
            for place in reversed(range(count)):
                request = self._running[place]
                self._remove(place)
                self._resolve(request, _engine_failed(error, count))
            return
        with self._changed:
            self._calls += 1
            self._steps += count
        left = [place for place in range(count) if not self._advance(place, bool(finite[place]))]
        for place in reversed(left):
            self._remove(place)

    def _forecasts_first(self) -> int:
        """Give the lowest places to the requests whose next step is a forecast; how many there are."""
        found = [place for place in range(self._chains.count) if not self._chains.is_full(place)]
        for place, request in enumerate(found):
            self._chains.swap(place, request)
            self._running[place], self._running[request] = self._running[request], self._running[place]
        return len(found)

    def _advance(self, place: int, finite: bool) -> bool:
        """Report its step to one request. False: it needs its place no longer."""
        request, step = self._running[place], self._chains.step_of(place) + 1
        if request.cancelled():
            return False
        try:
            if not finite:
                raise self._chains.failure(place)
            if self._report(request, place, step):
                raise SamplingStopped(f"stopped by the callback at step {step} of image {request.image}.")
            if step == 0:
                self._resolve(request, self._result(place))
        except BaseException as error:  # of the callback or the decoder: only this request fails
            self._resolve(request, error)
            return False
        return step > 0

    def _report(self, request: _Request, place: int, step: int) -> bool:
        if request.callback is None:
            return False
        steps = len(request.schedule)
        wants_x = request.preview_every and (steps - step) % request.preview_every == 0
        return bool(request.callback(Progress(step, steps, self._chains.x[place].copy() if wants_x else None)))

    def _result(self, place: int) -> Result:
        x = self._chains.x[place : place + 1]
        result: Result = self._sampler.to_images(x)[0] if self._sampler.makes_images else x[0].copy()
        return result

    def _remove(self, place: int) -> None:
        self._chains.remove(place)
        last = self._running.pop()
        if place < len(self._running):
            self._running[place] = last

    def _resolve(self, request: _Request, outcome: Result | BaseException) -> None:
        self._forget(request)
        with contextlib.suppress(InvalidStateError):  # cancelled just now
            request.set_exception(outcome) if isinstance(outcome, BaseException) else request.set_result(outcome)
        _PENDING.discard(request)

    # From any thread.

    def _forget(self, request: _Request) -> None:
        """Make room for another request, before the owner of this one's future is notified."""
        with self._changed:
            self._unfinished.discard(request)
            with contextlib.suppress(ValueError):
                self._waiting.remove(request)


def _late(when: str) -> DeadlineError:
    return DeadlineError(f"the deadline passed {when}. Give it more time, or take fewer requests at once.")


def _engine_failed(error: BaseException, count: int) -> SamplingError:
    reason = str(error) if isinstance(error, TqditError) else f"{type(error).__name__}: {error}"
    failure = SamplingError(f"the engine failed in a call of {count} image(s) ({reason}).")
    failure.__cause__ = error
    return failure


def _close_at_exit(batcher: weakref.ref[StepBatcher]) -> None:
    alive = batcher()
    if alive is not None:
        alive.close(drain=False)
