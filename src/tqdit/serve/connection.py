"""Connections of clients that are slow, or say what is no HTTP: each is answered or closed within a time."""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
import termios
from asyncio import TimerHandle, Transport
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from tqdit.serve.refusals import Refusal
from tqdit.serve.settings import Settings
from tqdit.serve.shapes import ErrorAnswer

LEAST_BYTES = 20_000  # that a client takes of an answer that waits for it, in each `client_s`
EARLY_BYTES = 65_536  # that a client may send of the requests after the one in work


class Connection(H11Protocol):
    """One client. It must send its whole request within a time, and take its answer at a least speed."""

    settings: ClassVar[Settings]
    refused: Callable[[int], None]  # called with the status of each answer that is given without the application
    reading: TimerHandle | None = None  # until the request is there
    writing: TimerHandle | None = None  # while its buffer is full

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()
        if len(self.connections) > self.settings.connections:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look_at_a_whole_request()

    def on_response_complete(self) -> None:
        self._expect_request()
        super().on_response_complete()  # begins the next request if it came along with this one
        self._look_at_a_whole_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reader()

    def resume_writing(self) -> None:
        self._stop("writing")
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("reading")
        self._stop("writing")
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Of what is no HTTP, in the shape of every other error."""
        self._refuse(Refusal(400, "invalid_value", msg))

    def _refuse(self, refusal: Refusal) -> None:
        """Answer without the application, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # no answer has begun
            body = msgspec.json.encode(ErrorAnswer(refusal.body))
            length = b"%d" % len(body)
            headers = [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close")]
            for event in (
                h11.Response(status_code=refusal.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()
            ):  # fmt: skip
                self.transport.write(self.conn.send(event) or b"")
            self.refused(refusal.status)
        self.transport.close()

    def _look_at_a_whole_request(self) -> None:
        """While it is answered, only reading tells that the client has left; uvicorn stops it at what comes early."""
        if self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete:
            self._stop("reading")
            if len(self.conn.trailing_data[0]) <= EARLY_BYTES:
                self.flow.resume_reading()
            else:  # a connection that is not read does not tell that the client has left
                self._leave_unfinished()
                self._refuse(Refusal(413, "too_large", f"more than {EARLY_BYTES} bytes came before the answer."))

    def _expect_request(self) -> None:
        self._stop("reading")
        self.reading = self.loop.call_later(self.settings.client_s, self._too_slow)

    def _too_slow(self) -> None:
        """The request is not there in time: answer what has begun, and close what has not."""
        if self.transport.get_write_buffer_size():  # the client is still taking the answer before
            if self.writing is None:
                self._expect_reader()
            self._expect_request()
            return
        works = self.cycle is not None and not self.cycle.response_complete
        if self.transport.is_closing() or not (works or self.conn.trailing_data[0]):
            self.transport.abort()
            return
        if works:  # the application waits for the rest of a body; it is told that the client has left
            self._leave_unfinished()
        seconds = f"{self.settings.client_s:g}"
        self._refuse(Refusal(408, "too_slow", f"the request was not complete after {seconds} s."))
        self.reading = self.loop.call_later(self.settings.client_s, self.transport.abort)  # if it is not taken

    def _leave_unfinished(self) -> None:
        """Tell the application that the client of the request in work has left."""
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    def _expect_reader(self) -> None:
        """Look again later whether the client has taken something of what waits for it."""
        before = self._untaken()

        def look() -> None:
            self.writing = None
            if not self.transport.get_write_buffer_size():
                return  # the kernel has the rest
            if before - self._untaken() < LEAST_BYTES:
                self._reset()
            else:
                self._expect_reader()

        self._stop("writing")
        self.writing = self.loop.call_later(self.settings.client_s, look)

    def _reset(self) -> None:
        """Also drop what the kernel holds: until the client reads it, the connection would stay open."""
        linger = struct.pack("ii", 1, 0)
        with suppress(OSError):  # the other side has left
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.transport.abort()

    def _untaken(self) -> int:
        """Bytes that wait here, and those that the kernel holds for the client: it takes megabytes at once, and asks
        for more when a third of them is gone."""
        return self.transport.get_write_buffer_size() + _bytes_in_kernel(self.transport.get_extra_info("socket"))

    def _stop(self, name: str) -> None:
        timer: TimerHandle | None = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)


def _bytes_in_kernel(connected: Any) -> int:
    """That the other side has not acknowledged; 0 if the system does not tell, or the socket is closed."""
    try:
        return int.from_bytes(fcntl.ioctl(connected.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except (OSError, ValueError):
        return 0


def connection_type(settings: Settings, refused: Callable[[int], None]) -> type[Any]:
    """A class of connections with these settings, for uvicorn's `http`.

    refused: called with the status of each answer that the application does not know of.
    """
    return type("Connection", (Connection,), {"settings": settings, "refused": staticmethod(refused)})
