"""The paths of the API: what each answers, and what /openapi.json says of it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, TypeVar

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tqdit.errors import TqditError
from tqdit.serve import openapi
from tqdit.serve.events import Event, as_text, watch
from tqdit.serve.jobs import ImageJob, image_answer, job_answer
from tqdit.serve.refusals import Refusal, bad_json, json_response, refusal_of
from tqdit.serve.service import Service
from tqdit.serve.shapes import (
    Health,
    ImageAnswer,
    ImageRequest,
    JobAnswer,
    ModelEntry,
    ModelList,
    decode_request,
)

EVENTS = "text/event-stream"
LINGER_S, LINGER_BYTES = 0.3, 2**20  # that are still taken of a request that is too large
Handler = Callable[[Service, Request], Awaitable[Response]]
T = TypeVar("T")


@dataclass(frozen=True)
class Endpoint:
    """One method of one path."""

    method: str
    path: str
    handler: Handler
    summary: str
    answers: Mapping[int, Any]  # status -> type of the JSON, or media types of something else
    refusals: tuple[int, ...] = ()
    body: type | None = None
    is_open: bool = False  # without the API key

    def route(self) -> Route:
        async def answer(request: Request) -> Response:
            service: Service = request.app.state.service
            try:
                service.check_host(request.headers.get("host", ""))
                if not self.is_open:
                    service.check_key(request.headers.get("authorization"))
                response = await self.handler(service, request)
            except (Refusal, TqditError) as error:
                response = refusal_of(error).response()
            service.metrics.answered(self.path, response.status_code)
            return response

        return Route(self.path, answer, methods=[self.method])


async def read_request(service: Service, request: Request) -> ImageRequest:
    """The body. Raises Refusal if it is too large, or no request."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # web pages of other origins cannot send this one unasked
        message = f"the content type is '{kind:.60}'; expected application/json. Send the header 'Content-Type'."
        raise Refusal(415, "unsupported_media_type", message)
    most, length = service.settings.body_bytes, request.headers.get("content-length", "0")
    if not re.fullmatch("[0-9]{1,9}", length) or int(length) > most:
        await _discard(request)
        raise _too_large(most)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            await _discard(request)
            raise _too_large(most)
    try:
        return decode_request(bytes(body))
    except msgspec.DecodeError as error:
        raise bad_json(error) from None
    except (RecursionError, UnicodeDecodeError):
        raise Refusal(400, "invalid_json", "the body is no JSON object of UTF-8.") from None


def _too_large(most: int) -> Refusal:
    return Refusal(413, "too_large", f"the body is larger than {most} bytes.")


async def _discard(request: Request) -> None:
    """Take what the client sends for a moment: a socket that is closed with unread bytes may lose our answer."""
    read = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while read < LINGER_BYTES and (message := await request.receive())["type"] == "http.request":
                read += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


async def generate(service: Service, request: Request) -> Response:
    """Make images and wait for them; or, with `stream`, tell by events. A client that leaves cancels them."""
    asked = await read_request(service, request)
    job = await _unless_left(service.start(asked), request)
    if job.order.as_url:
        service.jobs.add(job)
    if asked.stream:
        return EventStream(_until_left(job, str(request.base_url)))
    await _finish_or_cancel(job, request)
    job.check()
    return json_response(image_answer(job, str(request.base_url)))


async def _unless_left(work: Coroutine[Any, Any, T], request: Request) -> T:
    """The result of work that ends if the client leaves. Raises ClientDisconnect then."""
    task, left = asyncio.create_task(work), asyncio.create_task(_left(request))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        left.cancel()
        task.cancel()


async def _finish_or_cancel(job: ImageJob, request: Request) -> None:
    try:
        with job.listening():
            await _unless_left(_ended(job), request)
    finally:
        job.cancel()


async def _ended(job: ImageJob) -> None:
    await asyncio.wait({job.task})


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


Events = AsyncGenerator[Event | None, None]


async def _until_left(job: ImageJob, base_url: str) -> Events:
    try:
        async with aclosing(watch(job, base_url, with_states=False)) as events:
            async for event in events:
                yield event
    finally:
        job.cancel()


class EventStream(StreamingResponse):
    """Server-sent events, whose generator is closed as soon as the client leaves."""

    def __init__(self, events: Events) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff"}
        super().__init__((as_text(event) async for event in events), headers=headers, media_type=EVENTS)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def list_models(service: Service, request: Request) -> Response:
    return json_response(ModelList([engine.describe(service.settings) for engine in service.engines.values()]))


async def show_model(service: Service, request: Request) -> Response:
    return json_response(service.engine(request.path_params["model"]).describe(service.settings))


async def start_job(service: Service, request: Request) -> Response:
    """Make images without a connection that waits for them."""
    asked = await read_request(service, request)
    if asked.stream:
        raise Refusal(
            400, "invalid_value", "a job has its events under /v1/jobs/ID/events. Leave stream out.", "stream"
        )
    service.check_keeps_jobs()
    job = await _unless_left(service.start(asked), request)
    service.jobs.add(job)
    return json_response(job_answer(job, str(request.base_url)), 202, {"Location": f"/v1/jobs/{job.id}"})


async def show_job(service: Service, request: Request) -> Response:
    return json_response(job_answer(service.jobs.get(request.path_params["job"]), str(request.base_url)))


async def watch_job(service: Service, request: Request) -> Response:
    job = service.jobs.get(request.path_params["job"])
    return EventStream(watch(job, str(request.base_url), with_states=True))


async def remove_job(service: Service, request: Request) -> Response:
    """Cancel a job that works, and forget it."""
    service.jobs.remove(service.jobs.get(request.path_params["job"]))
    return Response(status_code=204)


async def show_image(service: Service, request: Request) -> Response:
    """An image by the address that `response_format: url` gave."""
    job = service.jobs.get(request.path_params["job"])
    pngs = {f"{index}.png": row.png for index, row in enumerate(job.rows)}
    png = pngs.get(request.path_params["name"])
    if png is None:
        raise Refusal(404, "not_found", "no such image, or it is not done.")
    headers = {"Cache-Control": "private, max-age=3600, immutable", "X-Content-Type-Options": "nosniff"}
    return Response(png, headers=headers, media_type="image/png")


async def live(service: Service, request: Request) -> Response:
    return json_response(Health("ok"))


async def ready(service: Service, request: Request) -> Response:
    health = service.health()
    return json_response(health, 200 if health.status == "ok" else 503)


async def show_metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def show_page(service: Service, request: Request) -> Response:
    content, policy = page()
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff",
               "Referrer-Policy": "no-referrer"}  # fmt: skip
    return Response(content, headers=headers, media_type="text/html")


@cache
def page() -> tuple[bytes, str]:
    """page.html, and the policy that lets a browser run its own script and style and nothing else."""
    content = resources.files("tqdit.serve").joinpath("page.html").read_bytes()
    digests = {}
    for tag in ("script", "style"):
        found = re.search(rf"<{tag}>(.*?)</{tag}>".encode(), content, re.DOTALL)
        assert found is not None
        digests[tag] = base64.b64encode(hashlib.sha256(found[1]).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digests['script']}'; style-src 'sha256-{digests['style']}'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return content, policy


async def show_openapi(service: Service, request: Request) -> Response:
    return json_response(openapi.document(ENDPOINTS))


ASKING = (400, 401, 404, 408, 409, 413, 415, 429, 500, 503, 504)
ENDPOINTS = (
    Endpoint("POST", "/v1/images/generations", generate, "Make images and wait for them", {200: (ImageAnswer, EVENTS)},
             ASKING, ImageRequest),
    Endpoint("GET", "/v1/images/{job}/{name}", show_image, "An image", {200: "image/png"}, (404,), is_open=True),
    Endpoint("GET", "/v1/models", list_models, "The models", {200: ModelList}, (401,)),
    Endpoint("GET", "/v1/models/{model}", show_model, "A model", {200: ModelEntry}, (401, 404)),
    Endpoint("POST", "/v1/jobs", start_job, "Make images without waiting", {202: JobAnswer}, ASKING, ImageRequest),
    Endpoint("GET", "/v1/jobs/{job}", show_job, "A job's state and images", {200: JobAnswer}, (401, 404)),
    Endpoint("GET", "/v1/jobs/{job}/events", watch_job, "A job's events", {200: EVENTS}, (401, 404)),
    Endpoint("DELETE", "/v1/jobs/{job}", remove_job, "Cancel and forget a job", {204: None}, (401, 404)),
    Endpoint("GET", "/health/live", live, "The server answers", {200: Health}, is_open=True),
    Endpoint("GET", "/health/ready", ready, "The server takes requests", {200: Health, 503: Health}, is_open=True),
    Endpoint("GET", "/metrics", show_metrics, "Numbers for Prometheus", {200: "text/plain"}, (401,)),
    Endpoint("GET", "/openapi.json", show_openapi, "This document", {200: dict}, is_open=True),
    Endpoint("GET", "/", show_page, "The page", {200: "text/html"}, is_open=True),
)  # fmt: skip
