"""The OpenAPI document, made of the endpoints and of the types that they read and write."""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from tqdit.serve.shapes import CompletedImage, ErrorAnswer, JobEvent, PartialImage
from tqdit.version import __version__

if TYPE_CHECKING:
    from tqdit.serve.routes import Endpoint

# What the data of a server-sent event may be; OpenAPI 3.1 has no word for it, so it stands under `x-events`.
EVENT_TYPES = (PartialImage, CompletedImage, JobEvent, ErrorAnswer)
DESCRIPTION = "Images of diffusion transformers. POST /v1/images/generations has the shape of OpenAI's images API."


def document(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """OpenAPI 3.1."""
    endpoints = list(endpoints)
    types = _types(endpoints)
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    references = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, references)
    return {
        "openapi": "3.1.0",
        "info": {"title": "tqdit-serve", "version": __version__, "description": DESCRIPTION},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _types(endpoints: list[Endpoint]) -> list[Any]:
    found: list[Any] = list(EVENT_TYPES)
    for endpoint in endpoints:
        answers = [each for answer in endpoint.answers.values() for each in _alternatives(answer)]
        found += [each for each in (endpoint.body, *answers) if isinstance(each, type)]
    return list(dict.fromkeys(found))


def _alternatives(answer: Any) -> tuple[Any, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


def _operation(endpoint: Endpoint, references: dict[Any, Any]) -> dict[str, Any]:
    responses = {}
    for status, answer in endpoint.answers.items():
        content = {}
        for each in _alternatives(answer):
            if isinstance(each, type):
                content["application/json"] = {"schema": references[each]}
            elif each == "text/event-stream":
                content[each] = {"schema": {"type": "string"}, "x-events": [references[event] for event in EVENT_TYPES]}
            elif each is not None:
                content[each] = {"schema": {"type": "string"}}
        responses[str(status)] = {"description": HTTPStatus(status).phrase, **({"content": content} if content else {})}
    refused = {"application/json": {"schema": references[ErrorAnswer]}}
    for status in (*endpoint.refusals, 421):  # any path may be asked for under a name that is not ours
        responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": refused}
    names = re.findall(r"\{(\w+)\}", endpoint.path)
    operation: dict[str, Any] = {
        "summary": endpoint.summary, "operationId": endpoint.handler.__name__, "responses": responses,
        "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names],
        "security": [] if endpoint.is_open else [{"key": []}, {}],
    }  # fmt: skip
    if endpoint.body is not None:
        body = {"application/json": {"schema": references[endpoint.body]}}
        operation["requestBody"] = {"required": True, "content": body}
    return operation
