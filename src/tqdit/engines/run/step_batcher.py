"""Step-level batching for servers: requests that arrive at any time share each engine call, whatever their steps."""

from __future__ import annotations

import contextlib
import math
import operator
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.step_rows import StepRows, check_guidance, check_labels
from tqdit.errors import DeadlineError, QueueFullError, SamplingError, SamplingStopped, TqditError, UsageError
from tqdit.sampling.noise import check_key


@dataclass(frozen=True)
class Progress:
    """What a request's callback is told after each of its steps."""

    step: int  # that has just been computed; 0 is the last
    steps: int  # of the chain
    x: NDArray[np.float32] | None  # (C, H, W), a copy of its state, at every `preview_every`-th step


ProgressCallback = Callable[[Progress], bool | None]
Result = NDArray[Any]  # uint8 (H, W, 3), or float32 (C, H, W) of a latent model without a decoder


@dataclass(frozen=True)
class BatcherStats:
    """A moment of a batcher, for a server's metrics."""

    waiting: int  # requests without a row
    running: int  # requests with a row
    engine_calls: int  # so far
    steps: int  # rows that those calls computed; steps / engine_calls is the mean batch


class _Request(Future[Result]):
    """One image to be made, and the future that its owner holds.

    It stays pending until it is done, so that it can be cancelled while it runs.
    """

    def __init__(self, batcher: StepBatcher, label: int, scale: float, seed: int, image: int) -> None:
        super().__init__()
        self.label, self.scale, self.seed, self.image = label, scale, seed, image
        self.expires = math.inf  # time.monotonic(), in seconds
        self.callback: ProgressCallback | None = None
        self.preview_every = 0
        self.counted = False  # among the batcher's unfinished requests
        self._batcher = batcher
        self._untold = threading.Lock()

    def cancel(self) -> bool:
        if not self.done():
            self._batcher._forget(self)
        cancelled = super().cancel()
        if cancelled and self._untold.acquire(blocking=False):
            self.set_running_or_notify_cancel()  # wakes concurrent.futures.wait; fails when done twice
        return cancelled


class StepBatcher:
    """Runs many requests on one engine, a row each; rows at different steps share every call. Thread-safe.

        with StepBatcher("model.engine", batch=16) as batcher:
            future = batcher.submit(3, seed=7)
            image = future.result()  # uint8 (H, W, 3)

    A request gets a row at the next step after one is free, in the order of arrival, and keeps it until its image is
    done. Every running row takes part in every call. The image is that of
    `Sampler.sample([label], guidance_scale, seed, first_image=image_index)`, bit for bit on one CPU backend.

    One thread makes the engine calls, decodes and runs the callbacks, so a slow callback holds up everybody. States
    exist only for running rows, in buffers that are allocated once.
    """

    def __init__(
        self, sampler: Sampler | str | Path, *, batch: int | None = None, queue: int = 256, threads: int | None = None
    ) -> None:
        """sampler: an open one, which stays the caller's to close, or the path of a bundle, which this object opens
        and closes. batch: rows per engine call at most; None: as many as `Sampler.open` chooses. queue: how many
        requests may wait for a row. threads: CPU threads of an engine that is opened here.

        Raises UsageError for impossible numbers and, for a path, what `Sampler.open` raises.
        """
        if queue < 0 or (batch is not None and batch < 1):
            raise UsageError(f"batch is {batch} and queue {queue}; expected at least 1 and 0.")
        self._owns_sampler = not isinstance(sampler, Sampler)
        if not isinstance(sampler, Sampler):
            sampler = Sampler.open(sampler, batch=batch, threads=threads)
        elif threads is not None:
            raise UsageError("threads belongs to an engine that is opened here; this sampler is open already.")
        self._sampler = sampler
        batch = sampler.batch if batch is None else batch
        if batch > sampler.batch:
            raise UsageError(
                f"batch is {batch}, the sampler was opened for {sampler.batch}. Open it with batch={batch}."
            )
        self.card = self._sampler.card
        self.batch = batch
        self.queue = queue
        self._rows = StepRows(self.card, batch)  # the worker's own, like the list beside it
        self._running: list[_Request] = []  # by row
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[_Request] = deque()
        self._unfinished = 0
        self._closing = False  # no new requests
        self._stopping = False  # and the old ones are not finished either
        self._calls = self._steps = 0
        self._worker = threading.Thread(target=self._work, name="tqdit-step-batcher", daemon=True)
        # A daemon thread inside an engine call must not outlive the interpreter: finalizers run before it goes down.
        weakref.finalize(self, _close_at_exit, weakref.ref(self))
        self._worker.start()

    def submit(
        self,
        class_label: int,
        *,
        guidance_scale: float | None = None,
        seed: int = 0,
        image_index: int = 0,
        deadline: float | None = None,
        on_progress: ProgressCallback | None = None,
        preview_every: int = 0,
    ) -> Future[Result]:
        """Queue one image and return at once; `future.result()` gives it, `asyncio.wrap_future(future)` awaits it.

        The result is a uint8 image (H, W, 3), or float32 latents (C, H, W) of a latent model without a decoder.

        class_label: 0..num_classes, the last one is unconditional. guidance_scale None: the engine's default.
        deadline: seconds from now; looked at before every step. on_progress: called after each of the request's
        steps, on the batcher's thread; returning True stops the request. preview_every N: its Progress carries a copy
        of the state after every Nth step (`sampler.to_images` makes pictures of it).

        `future.cancel()` succeeds until the result is there: a waiting request is gone at once, a running one frees
        its row before the next step. `future.running()` is always False for this reason.

        Raises QueueFullError where no more requests are taken, UsageError for bad values and after `close`. The
        future fails with DeadlineError, SamplingError (NaN, or the engine's error as its cause), SamplingStopped (by
        the callback or by `close(drain=False)`) or whatever the callback raised.
        """
        label = int(check_labels(self.card, [class_label])[0])
        scale = check_guidance(self.card, guidance_scale)
        seed, image = operator.index(seed), operator.index(image_index)
        check_key(seed, image)
        if deadline is not None and not deadline > 0:
            raise UsageError(f"deadline is {deadline}; it counts seconds from now and must be above 0.")
        if preview_every < 0 or (preview_every and on_progress is None):
            raise UsageError(f"preview_every is {preview_every}; expected 0 or more, with an on_progress to call.")
        expires = math.inf if deadline is None else time.monotonic() + deadline
        request = _Request(self, label, scale, seed, image)
        request.expires, request.callback, request.preview_every = expires, on_progress, preview_every
        with self._changed:
            if self._closing:
                raise UsageError("this batcher is closed. Make another one.")
            if self._unfinished >= self.batch + self.queue:
                raise QueueFullError(
                    f"{self._unfinished} requests are unfinished, the batcher takes {self.batch} running and "
                    f"{self.queue} waiting. Submit again when one is done, or make the queue longer."
                )
            self._unfinished += 1
            request.counted = True
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    @property
    def sampler(self) -> Sampler:
        """The sampler whose engine runs."""
        return self._sampler

    def stats(self) -> BatcherStats:
        with self._changed:
            return BatcherStats(len(self._waiting), len(self._running), self._calls, self._steps)

    def close(self, drain: bool = True) -> None:
        """Take no more requests, finish (`drain`) or fail the open ones, and end the thread; may be called twice.

        Waits for the thread, except where a callback calls it. drain=False: unfinished requests fail with
        SamplingStopped as soon as the engine call in progress returns; it overrides an earlier drain.
        """
        with self._changed:
            self._closing = True
            self._stopping = self._stopping or not drain
            self._changed.notify_all()
        if threading.current_thread() is not self._worker:
            self._worker.join()

    def __enter__(self) -> StepBatcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
                self._fail(request, SamplingStopped("the batcher was closed before this image was done."))
            if self._owns_sampler:
                self._sampler.close()

    def _between_steps(self) -> bool:
        """Free the rows of cancelled and late requests and fill rows from the queue; waits where there is nothing to
        do. False: the batcher was closed and nothing is left to be finished.
        """
        now = time.monotonic()
        for row in reversed(range(len(self._running))):
            request = self._running[row]
            if request.cancelled():
                self._remove(row)
            elif request.expires <= now:
                self._remove(row)
                self._fail(request, _late(f"at step {self._rows.step_of(row)}"))
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
            self._fail(request, _late("while it waited for a row"))
        for request in admitted:
            self._rows.add(request.label, request.scale, request.seed, request.image)
        return True

    def _step(self) -> None:
        """One engine call for every running row."""
        count = self._rows.count
        if not count:
            return
        try:
            finite = self._rows.advance(self._sampler.step(self._rows.inputs()))
        except BaseException as error:  # whatever it is: the thread lives on, and the requests hear of it
            for row in reversed(range(count)):
                request = self._running[row]
                self._remove(row)
                self._fail(request, _engine_failed(error, count))
            return
        with self._changed:
            self._calls += 1
            self._steps += count
        left = [row for row in range(count) if not self._advance(row, bool(finite[row]))]
        for row in reversed(left):
            self._remove(row)

    def _advance(self, row: int, finite: bool) -> bool:
        """Tell one request of its step. False: it is done with its row."""
        request, step = self._running[row], self._rows.step_of(row) + 1
        if request.cancelled():
            return False
        try:
            if not finite:
                raise self._rows.failure(row)
            if self._report(request, row, step):
                raise SamplingStopped(f"stopped by the callback at step {step} of image {request.image}.")
            if step == 0:
                self._succeed(request, self._result(row))
        except BaseException as error:  # of the callback or the decoder: this request's alone
            self._fail(request, error)
            return False
        return step > 0

    def _report(self, request: _Request, row: int, step: int) -> bool:
        if request.callback is None:
            return False
        steps = self.card.sampling.steps
        wants_x = request.preview_every and (steps - step) % request.preview_every == 0
        return bool(request.callback(Progress(step, steps, self._rows.x[row].copy() if wants_x else None)))

    def _result(self, row: int) -> Result:
        x = self._rows.x[row : row + 1]
        result: Result = self._sampler.to_images(x)[0] if self._sampler.makes_images else x[0].copy()
        return result

    def _remove(self, row: int) -> None:
        self._rows.remove(row)
        last = self._running.pop()
        if row < len(self._running):
            self._running[row] = last

    def _succeed(self, request: _Request, result: Result) -> None:
        self._forget(request)
        with contextlib.suppress(InvalidStateError):  # cancelled just now
            request.set_result(result)

    def _fail(self, request: _Request, error: BaseException) -> None:
        self._forget(request)
        with contextlib.suppress(InvalidStateError):
            request.set_exception(error)

    # From any thread.

    def _forget(self, request: _Request) -> None:
        """Make room for another request, before this one's future wakes anybody."""
        with self._changed:
            if request.counted:
                request.counted = False
                self._unfinished -= 1
                with contextlib.suppress(ValueError):
                    self._waiting.remove(request)


def _late(when: str) -> DeadlineError:
    return DeadlineError(f"the deadline passed {when}. Give it more time, or take fewer requests at once.")


def _engine_failed(error: BaseException, count: int) -> SamplingError:
    reason = str(error) if isinstance(error, TqditError) else f"{type(error).__name__}: {error}"
    failure = SamplingError(f"the engine failed in a call of {count} row(s) ({reason}).")
    failure.__cause__ = error
    return failure


def _close_at_exit(batcher: weakref.ref[StepBatcher]) -> None:
    alive = batcher()
    if alive is not None:
        alive.close(drain=False)
