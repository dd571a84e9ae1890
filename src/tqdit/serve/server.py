"""uvicorn with our connections, and an end that finishes the images that are being made."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from tqdit.serve.connection import connection_type
from tqdit.serve.service import Service

LOOK_S = 0.1
GRACE_S = 5.0  # for answers to be written, after the last image


class Server(uvicorn.Server):
    """One process. SIGTERM and Ctrl-C end it after at most `shutdown_s`, a few seconds, and an engine call."""

    def __init__(self, app: Starlette, host: str, port: int) -> None:
        self.service: Service = app.state.service
        settings = self.service.settings
        super().__init__(
            uvicorn.Config(
                app, host=host, port=port, http=connection_type(settings), ws="none", log_config=None,
                log_level="error", access_log=False, server_header=False,
                timeout_graceful_shutdown=int(settings.shutdown_s + GRACE_S),
            )
        )  # fmt: skip

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, finish the others, then close."""
        draining = asyncio.create_task(self.service.drain(self.service.settings.shutdown_s))
        hurrying = asyncio.create_task(self._hurry())
        await super().shutdown(sockets)
        await draining
        hurrying.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn hurries at a second Ctrl-C alone."""
        self.force_exit = self.force_exit or self.should_exit
        super().handle_exit(sig, frame)

    async def _hurry(self) -> None:
        """A second Ctrl-C or SIGTERM ends the waiting for images."""
        while not self.force_exit:
            await asyncio.sleep(LOOK_S)
        self.service.hurry()
