"""uvicorn with our connections, and an end that finishes the images that are being made."""

from __future__ import annotations

import asyncio
import socket
import time
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from tqdit.serve.connection import connection_type
from tqdit.serve.service import Service

LOOK_S = 0.1
GRACE_S, LAST_S = 5.0, 1.0  # for answers to be written, after the last image; after a second signal


class Server(uvicorn.Server):
    """One process. SIGTERM and Ctrl-C end it after at most `shutdown_s`, a few seconds, and an engine call."""

    def __init__(self, app: Starlette, host: str, port: int) -> None:
        self.service: Service = app.state.service
        settings = self.service.settings
        super().__init__(
            uvicorn.Config(
                app, host=host, port=port, http=connection_type(settings, self._refused), ws="none", log_config=None,
                log_level="error", access_log=False, server_header=False,
            )
        )  # fmt: skip

    def _refused(self, status: int) -> None:
        self.service.metrics.answered("none", status)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, finish the others, then close."""
        ending = asyncio.create_task(self._end())
        await super().shutdown(sockets)  # until no connection is left, or at once if it is to hurry
        await ending
        await self.lifespan.shutdown()  # uvicorn leaves it out if it is to hurry; nothing if it has ended

    async def _end(self) -> None:
        hurrying = asyncio.create_task(self._hurry())
        try:
            await self.service.drain(self.service.settings.shutdown_s)
            await self._wait_for_answers(LAST_S if self.force_exit else GRACE_S)
        finally:
            hurrying.cancel()
            for connection in [*self.server_state.connections]:  # of clients that do not take theirs
                connection.transport.abort()
        await self._wait_for_answers(LAST_S)

    async def _wait_for_answers(self, seconds: float) -> None:
        """Until every answer is written, at most so long."""
        state, until = self.server_state, time.monotonic() + seconds
        while (state.connections or state.tasks) and time.monotonic() < until:
            await asyncio.sleep(LOOK_S)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn hurries at a second Ctrl-C alone."""
        self.force_exit = self.force_exit or self.should_exit
        super().handle_exit(sig, frame)

    async def _hurry(self) -> None:
        """A second Ctrl-C or SIGTERM ends the waiting for images."""
        while not self.force_exit:
            await asyncio.sleep(LOOK_S)
        self.service.hurry()
