"""Answers to what goes wrong: a status and one line, in the shape of OpenAI's errors. No path, no traceback."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping
from typing import Literal

import msgspec
from starlette.responses import Response

from tqdit.errors import DeadlineError, QueueFullError, SamplingError, SamplingStopped, UsageError
from tqdit.serve.shapes import ErrorAnswer, ErrorBody, ErrorType

log = logging.getLogger("tqdit.serve")

ErrorCode = Literal[
    "invalid_value", "invalid_json", "unknown_model", "not_found", "method_not_allowed", "too_large", "too_slow",
    "unsupported_media_type", "wrong_host", "invalid_api_key", "queue_full", "deadline", "shutting_down",
    "client_closed", "sampling_failed", "internal",
]  # fmt: skip
TYPES: dict[int, ErrorType] = {401: "authentication_error", 429: "rate_limit_error"}


class Refusal(Exception):  # noqa: N818 (an answer, and often the client's error)
    """An answer other than the one that was asked for. param: the field at fault."""

    def __init__(
        self, status: int, code: ErrorCode, message: str, param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = ErrorBody(" ".join(message.split()), kind, param, code)

    def response(self) -> Response:
        return json_response(ErrorAnswer(self.body), self.status, self.headers)


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """What a program reads; no proxy keeps it."""
    more = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **(headers or {})}
    return Response(msgspec.json.encode(value), status, more, "application/json")


def refusal_of(error: BaseException) -> Refusal:
    """What is said of an error. What may hold paths goes to the log alone, under a reference."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UsageError):
        return Refusal(400, "invalid_value", str(error), _param(str(error)))
    if isinstance(error, QueueFullError):
        return Refusal(429, "queue_full", "the queue is full. Ask again later.", headers={"Retry-After": "1"})
    if isinstance(error, DeadlineError):
        return Refusal(504, "deadline", str(error))
    if isinstance(error, SamplingStopped):
        return Refusal(503, "shutting_down", "the server ends before the image was done. Ask again.")
    if isinstance(error, SamplingError) and error.__cause__ is None:  # a state became NaN
        return Refusal(500, "sampling_failed", str(error))
    reference = secrets.token_hex(4)
    log.error("error %s", reference, exc_info=error)
    return Refusal(500, "internal", f"the server failed; its log says why under {reference}.")


def bad_json(error: msgspec.DecodeError) -> Refusal:
    """Of a body that is no request."""
    text = str(error)
    at = re.search(r" - at `\$\.?([^`\[]*)", text)
    unknown = re.search(r"unknown field `(\w+)`", text)
    code: ErrorCode = "invalid_value" if isinstance(error, msgspec.ValidationError) else "invalid_json"
    example = '{"prompt": "3", "seed": 7}'
    message = f"{text[:300].rstrip('.')}; expected a JSON object such as {example}."
    return Refusal(400, code, message, unknown[1] if unknown else (at[1] or None) if at else None)


_PARAMS = (
    ("guidance scale", "guidance_scale"), ("guidance interval", "guidance_interval"),
    ("guidance, which has no interval", "guidance_interval"), ("full call", "full_calls"),
    ("sampler", "sampler"), ("seed", "seed"), ("step", "steps"),
    ("prompt", "prompt"),
)  # fmt: skip


def _param(message: str) -> str | None:
    """The field that a message of the sampler speaks of: the first of those that it names."""
    found = [(message.find(word), param) for word, param in _PARAMS if word in message]
    return min(found)[1] if found else None
