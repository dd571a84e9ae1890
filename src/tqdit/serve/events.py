"""Server-sent events of a job: progress, previews, images, and its end."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator

import msgspec

from tqdit.serve.jobs import ImageJob, Preview, encode, image_data, job_answer
from tqdit.serve.shapes import CompletedImage, ErrorAnswer, JobEvent, PartialImage

KEEP_ALIVE_S = 15.0  # a comment after so long, or proxies close the connection
PAUSE_S = 0.04  # between two looks at a job

Event = PartialImage | CompletedImage | JobEvent | ErrorAnswer


async def watch(job: ImageJob, base_url: str, with_states: bool) -> AsyncGenerator[Event | None, None]:
    """What happens from now on, and what is there already; None: nothing did for a time.

    with_states: with the job's own state after each change, and its end as the last event. Without it, only its images
    and an error. A preview that comes before the last one was sent takes its place.
    """
    images, previews, numbers = set[int](), dict[int, Preview](), Counter[int]()
    told: JobEvent | None = None
    with job.listening() as changed:
        while True:
            try:
                await asyncio.wait_for(changed.wait(), KEEP_ALIVE_S)
            except TimeoutError:
                yield None
                continue
            changed.clear()
            ended = job.task.done()
            for index, row in enumerate(job.rows):
                if row.png is not None and index not in images:
                    images.add(index)
                    yield _completed(job, index, base_url)
                elif row.preview is not None and row.preview is not previews.get(index):
                    previews[index] = row.preview
                    png = await row.preview.png(job.order.engine)
                    if png is not None:
                        yield _partial(job, index, numbers[index], previews[index].steps, png)
                        numbers[index] += 1
            if with_states and not ended:
                state = _state(job, base_url)
                if state != told:
                    told = state
                    yield state
            if ended:
                if with_states:
                    yield _state(job, base_url)
                elif job.failure is not None:
                    yield ErrorAnswer(job.failure.body)
                return
            await asyncio.sleep(PAUSE_S)


def as_text(event: Event | None) -> bytes:
    """The event on the wire."""
    if event is None:
        return b": waiting\n\n"
    name = "error" if isinstance(event, ErrorAnswer) else event.type if isinstance(event, JobEvent) else _tag(event)
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(event))


def _tag(event: PartialImage | CompletedImage) -> str:
    return str(event.__struct_config__.tag)


def _state(job: ImageJob, base_url: str) -> JobEvent:
    return JobEvent(type=f"job.{job.status}", job=job_answer(job, base_url, with_images=False))


def _partial(job: ImageJob, index: int, number: int, step: int, png: bytes) -> PartialImage:
    return PartialImage(
        b64_json=encode(png), partial_image_index=number, image_index=index, step=step, steps=job.order.chain.steps,
        created_at=int(job.created), size=job.order.engine.size,
    )  # fmt: skip


def _completed(job: ImageJob, index: int, base_url: str) -> CompletedImage:
    order, chain, data = job.order, job.order.chain, image_data(job, index, base_url)
    return CompletedImage(
        image_index=index, steps=chain.steps, created_at=int(job.created), model=order.engine.name, seed=order.seed,
        sampler=chain.sampler, guidance_scale=order.guidance_scale, guidance_interval=chain.guidance_interval,
        full_calls=order.full_count, size=order.engine.size, b64_json=data.b64_json, url=data.url,
    )  # fmt: skip
