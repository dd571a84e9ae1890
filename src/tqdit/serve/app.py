"""The ASGI application of some engines."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tqdit.serve.refusals import ErrorCode, Refusal, refusal_of
from tqdit.serve.routes import ENDPOINTS
from tqdit.serve.service import Service
from tqdit.serve.settings import Settings

NO_SETTINGS = Settings()


def make_app(engines: Mapping[str, str | Path], settings: Settings = NO_SETTINGS) -> Starlette:
    """The application that serves these bundles, by name. It opens them now and closes them when it ends.

    Any ASGI server can run it. Jobs are in the memory of its process, so a child process, as of uvicorn --workers,
    refuses them unless the settings say otherwise. `server.Server` also holds slow clients off and finishes images when
    it ends. Raises TqditError for what cannot be served.
    """
    return application(Service.open(engines, settings))


def application(service: Service) -> Starlette:
    """The application of a service, which it closes when it ends."""
    settings = service.settings

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.check_process()
        try:
            yield
        finally:
            await service.close()

    async def not_found(request: Request, error: Exception) -> Response:
        """Also of a method that a path does not have."""
        assert isinstance(error, HTTPException)
        codes: dict[int, ErrorCode] = {404: "not_found", 405: "method_not_allowed"}
        what = f"{request.method:.20} {request.scope['path']:.100}"  # `url` fails if the Host header is no name
        message = f"{what!r} is not of this server; /openapi.json lists what is."
        service.metrics.answered("none", error.status_code)
        code = codes.get(error.status_code, "invalid_value")
        return Refusal(error.status_code, code, message, headers=error.headers).response()

    async def failed(request: Request, error: Exception) -> Response:
        service.metrics.answered("none", 500)
        return refusal_of(error).response()

    async def gone(request: Request, error: Exception) -> Response:
        """The client left, or was disconnected, before its request was complete: nobody reads this."""
        return Response(status_code=400)

    cors = Middleware(
        CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"], expose_headers=["Location", "Retry-After"],
    )  # fmt: skip
    app = Starlette(
        routes=[endpoint.route() for endpoint in ENDPOINTS], lifespan=lifespan,
        middleware=[cors] if settings.cors_origins else [],
        exception_handlers={HTTPException: not_found, ClientDisconnect: gone, Exception: failed},
    )  # fmt: skip
    app.router.redirect_slashes = False  # a redirection would trust the Host header
    app.state.service = service
    return app
