"""An image service around one engine: request, progress, cancel. docs/guides/http-service.md explains it.

pip install '.[onnxruntime]' starlette uvicorn
python examples/http_service.py model.engine --port 8000
"""

from __future__ import annotations

import argparse
import contextlib
import io
import secrets
from asyncio import TimerHandle, Transport
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

import msgspec
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from tqdit import Sampler, StepBatcher
from tqdit.errors import DeadlineError, QueueFullError, TqditError

KEPT = 1000  # finished results in memory; the oldest are removed first
DEADLINE = 600.0  # seconds, of an image
ANSWER_SECONDS = 20.0  # from the first byte of a request, or from the connection, to the last byte of its answer
CONNECTIONS = 256  # open at the same time
BODY_BYTES = 16_384  # of a request


class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request."""

    label: int = msgspec.field(name="class")
    guidance_scale: float | None = None
    seed: int = 0
    steps: int | None = None
    sampler: str | None = None


class Connection(H11Protocol):
    """One client. A slow one is disconnected whatever it delays: the request's head, its body or the answer."""

    timer: TimerHandle

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timer = self.loop.call_later(ANSWER_SECONDS, transport.abort)
        if len(self.connections) > CONNECTIONS:
            transport.abort()

    def on_response_complete(self) -> None:
        self.timer.cancel()
        self.timer = self.loop.call_later(ANSWER_SECONDS, self.transport.abort)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.timer.cancel()
        super().connection_lost(exc)


SERVER: dict[str, Any] = {"http": Connection, "ws": "none"}  # settings of uvicorn


@dataclass
class Job:
    """One requested image."""

    future: Future[Any] = field(default_factory=Future)
    done: int = 0  # steps
    steps: int = 0

    def advance(self, progress: Any) -> None:
        """Called by the batcher's thread after each step, which waits for it: two assignments."""
        self.done, self.steps = progress.steps - progress.step, progress.steps

    def state(self) -> dict[str, Any]:
        if not self.future.done():
            return {"state": "working" if self.steps else "waiting", "step": self.done, "steps": self.steps}
        try:
            error = self.future.exception()
        except CancelledError:
            return {"state": "cancelled"}
        return {"state": "done"} if error is None else {"state": "failed", "reason": str(error)}


def make_app(engine: str, batch: int | None = None, queue: int = 256) -> Starlette:
    """The application; the engine is opened when the server starts and closed when it ends."""
    jobs: dict[str, Job] = {}

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        with StepBatcher(engine, batch=batch, queue=queue) as app.state.batcher:
            yield
            app.state.batcher.close(drain=False)

    async def submit(request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > BODY_BYTES:
                return JSONResponse({"error": f"a body of more than {BODY_BYTES} bytes"}, 413)
        try:
            wanted = msgspec.json.decode(body, type=Wanted)
            job = Job()
            job.future = request.app.state.batcher.submit(
                wanted.label, guidance_scale=wanted.guidance_scale, seed=wanted.seed, steps=wanted.steps,
                sampler=wanted.sampler, deadline=DEADLINE, on_progress=job.advance,
            )  # fmt: skip
        except QueueFullError as error:
            return JSONResponse({"error": str(error)}, 503, {"Retry-After": "5"})
        except msgspec.DecodeError as error:
            return JSONResponse({"error": f'{error}; expected a JSON object such as {{"class": 3, "seed": 7}}'}, 400)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)
        name = secrets.token_urlsafe(16)  # who knows it may fetch and cancel the image
        jobs[name] = job
        for old in [each for each in jobs if jobs[each].future.done()][:-KEPT]:
            del jobs[old]
        return JSONResponse({"id": name}, 202, {"Location": f"/images/{name}"})

    async def progress(request: Request) -> Response:
        job = jobs.get(request.path_params["name"])
        return JSONResponse({"error": "no such image"}, 404) if job is None else JSONResponse(job.state())

    async def picture(request: Request) -> Response:
        job = jobs.get(request.path_params["name"])
        if job is None:
            return JSONResponse({"error": "no such image"}, 404)
        if not job.future.done():
            return JSONResponse(job.state(), 409)
        try:
            pixels = job.future.result()  # uint8 (H, W, 3)
        except (CancelledError, TqditError) as error:
            return JSONResponse(job.state(), 504 if isinstance(error, DeadlineError) else 410)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")

    async def cancel(request: Request) -> Response:
        job = jobs.pop(request.path_params["name"], None)
        if job is None:
            return JSONResponse({"error": "no such image"}, 404)
        job.future.cancel()  # it takes no part in the next step
        return Response(status_code=204)

    async def health(request: Request) -> Response:
        stats = request.app.state.batcher.stats()
        return JSONResponse({"waiting": stats.waiting, "running": stats.running, "engine_calls": stats.engine_calls})

    routes = [
        Route("/images", submit, methods=["POST"]),
        Route("/images/{name}.png", picture),
        Route("/images/{name}", progress),
        Route("/images/{name}", cancel, methods=["DELETE"]),
        Route("/health", health),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={ClientDisconnect: gone})


async def gone(request: Request, error: Exception) -> Response:
    """The client left, or was disconnected, before its request was complete: nobody reads this."""
    return Response(status_code=400)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve images of one engine over HTTP.")
    parser.add_argument("engine", nargs="?", default="model.engine", help="default: %(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--batch", type=int, help="images per engine call (default: the engine's choice)")
    args = parser.parse_args()
    try:
        with Sampler.open(args.engine) as sampler:  # the server would wrap its error into a traceback
            if sampler.card.signature.label is None:
                parser.error(f"{args.engine}: shows no classes, and this service asks for classes alone.")
    except TqditError as error:
        parser.error(str(error))
    uvicorn.run(make_app(args.engine, args.batch), host=args.host, port=args.port, **SERVER)


if __name__ == "__main__":
    main()
