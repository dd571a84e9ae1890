"""Requests at work: images of one order, their progress, and what is kept of them."""

from __future__ import annotations

import asyncio
import base64
import io
import math
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tqdit.engines.run.images import FRAMES_PER_S
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.step_batcher import Progress
from tqdit.errors import DeadlineError
from tqdit.serve.engines import Order, ServedEngine
from tqdit.serve.refusals import Refusal, refusal_of
from tqdit.serve.settings import Settings
from tqdit.serve.shapes import ErrorBody, ImageAnswer, ImageData, JobAnswer, JobStatus

LEAST_S = 0.001  # that a request has left when its images are submitted
LATE_S = 0.5  # for the batcher to say where an image stood at its deadline; an engine call may take longer


class Preview:
    """The state of an image after so many steps, and its picture, which is made once for all who watch."""

    def __init__(self, steps: int, state: NDArray[np.float32]) -> None:
        self.steps = steps
        self._state = state
        self._picture: asyncio.Future[bytes | None] | None = None
        self._waiting = 0  # those who wait for it

    async def png(self, engine: ServedEngine) -> bytes | None:
        """None if it was dropped, or cannot be made, which the log tells."""
        if self._picture is None or self._picture.cancelled():
            loop = asyncio.get_running_loop()
            self._picture = loop.run_in_executor(engine.decoders, _picture, engine.batcher.sampler, self._state)
        picture = self._picture
        self._waiting += 1
        try:
            await asyncio.wait({picture})
        finally:
            self._waiting -= 1
            if not self._waiting:  # if it is not made yet, they have all left
                self.drop()
        return None if picture.cancelled() else picture.result()

    def drop(self) -> None:
        """Nobody needs it any more."""
        if self._picture is not None:
            self._picture.cancel()


class Row:
    """One image of a job. The batcher's thread writes `done`, `began` and `preview`."""

    def __init__(self) -> None:
        self.future: Future[NDArray[np.uint8]] | None = None
        self.done = 0  # steps
        self.began: float | None = None  # time.monotonic() of its first step
        self.preview: Preview | None = None  # the last one
        self.png: bytes | None = None

    def drop_preview(self) -> None:
        if self.preview is not None:
            self.preview.drop()
        self.preview = None


class ImageJob:
    """The images of one order. It works from its creation until `task` ends, which never raises."""

    def __init__(
        self, order: Order, began: float, deadline_s: float, report: Callable[[ImageJob, Row], None]
    ) -> None:  # fmt: skip
        """Submit all images or none; raises Refusal if they find no place.

        began: time.monotonic() of the request, from which its deadline counts. report: called for each image that ends.
        """
        self.id = secrets.token_urlsafe(16)  # who knows it may see the images
        self.order = order
        self.created = time.time()
        self.submitted, self.ended = began, math.inf  # time.monotonic()
        self._left = max(began + deadline_s - time.monotonic(), LEAST_S)
        self.refusal: Refusal | None = None
        self.is_cancelled = False
        self.rows = [Row() for _ in range(order.count)]
        self._loop = asyncio.get_running_loop()
        self._listeners: set[asyncio.Event] = set()
        self._wakes = False  # the loop has been asked to notify
        try:
            for index, row in enumerate(self.rows):
                row.future = order.engine.submit(order, index, self._left, self._progress(row))
        except BaseException:
            self._cancel_rows()
            raise
        self.task = asyncio.create_task(self._work(report))

    @property
    def status(self) -> JobStatus:
        if self.task.done():
            return "cancelled" if self.is_cancelled else "failed" if self.refusal else "completed"
        return "in_progress" if any(row.done for row in self.rows) else "queued"

    @property
    def is_watched(self) -> bool:
        return bool(self._listeners)

    @property
    def bytes_held(self) -> int:
        return sum(len(row.png or b"") for row in self.rows)

    def cancel(self) -> None:
        """Free its places in the engine's batch; does nothing to a job that has ended."""
        if not self.task.done() and self.refusal is None:
            self.is_cancelled = True
            self._cancel_rows()

    def fail(self, refusal: Refusal) -> None:
        """End it without its images; does nothing to a job that has ended."""
        if not self.task.done() and self.refusal is None:
            self.refusal = refusal
            self._cancel_rows()

    @property
    def failure(self) -> Refusal | None:
        """What an ended job has in place of images."""
        return Refusal(409, "client_closed", "this job was cancelled.") if self.is_cancelled else self.refusal

    def check(self) -> None:
        """Raise the Refusal that an ended job has in place of images."""
        if self.failure is not None:
            raise self.failure

    @contextmanager
    def listening(self) -> Any:
        """An event that is set whenever something has changed."""
        event = asyncio.Event()
        event.set()
        self._listeners.add(event)
        try:
            yield event
        finally:
            self._listeners.discard(event)

    def _progress(self, row: Row) -> Callable[[Progress], None]:
        def advance(progress: Progress) -> None:
            """On the batcher's thread, which waits for it."""
            if row.began is None:
                row.began = time.monotonic()
            row.done = progress.steps - progress.step
            if progress.x is not None and progress.step:  # the last one is the image
                row.preview = Preview(row.done, progress.x)
            if self._listeners and not self._wakes:
                self._wakes = True
                with suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(self._notify)

        return advance

    def _notify(self) -> None:
        self._wakes = False
        for event in self._listeners:
            event.set()

    def _cancel_rows(self) -> None:
        for row in self.rows:
            if row.future is not None:
                row.future.cancel()

    async def _work(self, report: Callable[[ImageJob, Row], None]) -> None:
        ends = [asyncio.create_task(self._finish(row, report)) for row in self.rows]
        try:
            async with asyncio.timeout(self._left + LATE_S):
                await asyncio.gather(*ends)
        except asyncio.CancelledError:
            self.is_cancelled = self.refusal is None  # by `cancel`, or because the loop ends; or by `fail`
        except DeadlineError as error:  # the batcher's, which is a TimeoutError, too
            self.refusal = self.refusal or refusal_of(error)
        except TimeoutError:
            futures = [row.future for row in self.rows if row.future is not None]
            made = all(each.done() and not each.cancelled() for each in futures)
            when = "while its images were written" if made else "during a call of the engine"
            self.refusal = refusal_of(DeadlineError(f"the deadline passed {when}."))
        except Exception as error:
            self.refusal = self.refusal or refusal_of(error)
            if self.refusal.body.code in ("internal", "sampling_failed"):
                self.order.engine.doubt()
        finally:
            self._cancel_rows()
            await asyncio.gather(*ends, return_exceptions=True)
            for row in self.rows:
                row.future = None
                row.drop_preview()
            self.order, self.ended = replace(self.order, content=None), time.monotonic()
            self._loop.call_soon(self._notify)  # when the task is done

    async def _finish(self, row: Row, report: Callable[[ImageJob, Row], None]) -> None:
        assert row.future is not None
        try:
            pixels = await asyncio.wrap_future(row.future)
            row.png = await self._loop.run_in_executor(self.order.engine.writers, to_png, pixels)
        finally:
            row.drop_preview()
            report(self, row)
            self._notify()


def _picture(sampler: Sampler, state: NDArray[np.float32]) -> bytes | None:
    """A state as a PNG; of a video its middle frame."""
    try:
        picture = sampler.to_images(state[None])[0]
        return to_png(picture if picture.ndim == 3 else picture[len(picture) // 2])
    except Exception as error:
        refusal_of(error)  # logs it; the image itself may succeed
        return None


def to_png(pixels: NDArray[np.uint8]) -> bytes:
    """uint8 (H, W, 3) as a file; a video (F, H, W, 3) as an animated one, which browsers show."""
    file = io.BytesIO()
    first, *others = map(Image.fromarray, pixels.reshape(-1, *pixels.shape[-3:]))
    video = {"save_all": True, "append_images": others, "duration": 1000 / FRAMES_PER_S, "loop": 0} if others else {}
    first.save(file, "PNG", **video)
    return file.getvalue()


def encode(png: bytes) -> str:
    return base64.b64encode(png).decode("ascii")


def image_data(job: ImageJob, index: int, base_url: str) -> ImageData:
    """An image in the form that was asked for."""
    if job.order.as_url:
        return ImageData(url=f"{base_url}v1/images/{job.id}/{index}.png")
    return ImageData(b64_json=encode(job.rows[index].png or b""))


def image_answer(job: ImageJob, base_url: str) -> ImageAnswer:
    """The answer of a completed job."""
    order, chain = job.order, job.order.chain
    return ImageAnswer(
        created=int(job.created), data=[image_data(job, index, base_url) for index in range(order.count)],
        model=order.engine.name, size=order.engine.size, seed=order.seed, steps=chain.steps, sampler=chain.sampler,
        guidance_scale=order.guidance_scale, guidance_interval=chain.guidance_interval,
        full_calls=order.full_count,
    )  # fmt: skip


def job_answer(job: ImageJob, base_url: str, with_images: bool = True) -> JobAnswer:
    """The state of a job; its images if they are wanted."""
    error: ErrorBody | None = job.refusal.body if job.refusal else None
    status = job.status
    return JobAnswer(
        id=job.id, status=status, created=int(job.created), model=job.order.engine.name, steps=job.order.chain.steps,
        progress=[row.done for row in job.rows], error=error,
        result=image_answer(job, base_url) if status == "completed" and with_images else None,
    )  # fmt: skip


class KeptJobs:
    """Jobs by id. Ended ones stay for a time; the oldest go first if they are too many or too large."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._jobs: dict[str, ImageJob] = {}

    def add(self, job: ImageJob) -> None:
        self._prune()
        self._jobs[job.id] = job
        job.task.add_done_callback(lambda _: self._prune())

    def get(self, name: str) -> ImageJob:
        """Raises Refusal if there is none of that name."""
        self._prune()
        job = self._jobs.get(name)
        if job is None:
            raise Refusal(404, "not_found", "no such job or image, or it is kept no longer.")
        return job

    def remove(self, job: ImageJob) -> None:
        self._jobs.pop(job.id, None)
        job.cancel()

    def __iter__(self) -> Iterator[ImageJob]:
        return iter([*self._jobs.values()])

    def _prune(self) -> None:
        oldest = time.monotonic() - self._settings.keep_s
        ended = [job for job in self._jobs.values() if job.task.done()]
        held = sum(job.bytes_held for job in ended)
        for left, job in zip(range(len(ended), 0, -1), ended, strict=True):
            if left <= self._settings.most_jobs and held <= self._settings.keep_bytes and job.ended >= oldest:
                break
            held -= job.bytes_held
            del self._jobs[job.id]
