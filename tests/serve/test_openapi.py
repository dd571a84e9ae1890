"""The OpenAPI document says what the server does."""

from __future__ import annotations

import re

import jsonschema
import pytest

from serve.client import GENERATIONS
from tqdit.serve.routes import ENDPOINTS


@pytest.fixture(scope="module")
def document(quick):
    return quick.ask("/openapi.json").json


def check(document, path, method, answer):
    """The answer is one that the document knows, of the type that it says."""
    responses = document["paths"][path][method]["responses"]
    assert str(answer.status) in responses, (path, answer.status)
    content = responses[str(answer.status)].get("content", {})
    assert answer.kind in content or not answer.content, (path, answer.kind)
    if answer.kind == "application/json":
        schema = {**content["application/json"]["schema"], "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(answer.json)


def test_every_route_is_in_it_and_nothing_else(document, quick):
    routes = {(route.path, method) for route in quick.server.config.app.routes for method in route.methods - {"HEAD"}}
    told = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    assert routes == told == {(each.path, each.method) for each in ENDPOINTS}


def test_every_reference_leads_somewhere_and_every_part_has_one_name(document):
    text = str(document)
    found = set(re.findall(r"#/components/schemas/(\w+)", text))
    assert found == set(document["components"]["schemas"])
    assert document["openapi"].startswith("3.1")
    names = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(names)) == len(names)
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert {each["name"] for each in operation["parameters"]} == set(re.findall(r"{(\w+)}", path))


def test_answers_are_as_it_says(document, quick):
    job = quick.ask("/v1/jobs", {"class": 1, "steps": 2, "response_format": "url"})
    check(document, "/v1/jobs", "post", job)
    here = f"/v1/jobs/{job.json['id']}"
    image = quick.ask(GENERATIONS, {"class": 1, "steps": 2, "response_format": "url"})
    path = image.json["data"][0]["url"].removeprefix(quick.url)
    check(document, GENERATIONS, "post", image)
    check(document, GENERATIONS, "post", quick.ask(GENERATIONS, {"class": 1, "steps": 2, "stream": True}))
    check(document, "/v1/images/{job}/{name}", "get", quick.ask(path))
    check(document, "/v1/jobs/{job}", "get", quick.ask(here))
    check(document, "/v1/jobs/{job}/events", "get", quick.ask(f"{here}/events"))
    check(document, "/v1/jobs/{job}", "delete", quick.ask(here, method="DELETE"))
    for path in ("/v1/models", "/health/live", "/health/ready", "/metrics", "/openapi.json", "/"):
        check(document, path, "get", quick.ask(path))
    check(document, "/v1/models/{model}", "get", quick.ask("/v1/models/tiny"))


def test_refusals_are_as_it_says(document, quick):
    for body, kind in (
        ({}, None),
        (b"{", None),
        (b" " * 20_000, None),
        ({"class": 1}, "text/plain"),
        ({"model": "x"}, None),
    ):
        answer = quick.ask(GENERATIONS, body, **({"Content-Type": kind} if kind else {}))
        assert answer.status >= 400
        check(document, GENERATIONS, "post", answer)
    check(document, "/v1/models/{model}", "get", quick.ask("/v1/models/x"))
    for method in ("get", "delete"):
        check(document, "/v1/jobs/{job}", method, quick.ask("/v1/jobs/x", method=method.upper()))


@pytest.mark.slow
def test_events_are_as_it_says(document, quick):
    stream = document["paths"]["/v1/jobs/{job}/events"]["get"]["responses"]["200"]["content"]["text/event-stream"]
    validator = jsonschema.Draft202012Validator({"oneOf": stream["x-events"], "components": document["components"]})
    job = quick.ask("/v1/jobs", {"class": 1, "steps": 1000, "previews": 5}).json["id"]
    with quick.streaming(f"/v1/jobs/{job}/events") as events:
        told = dict(events)
    assert {"image_generation.partial_image", "image_generation.completed", "job.completed"} <= set(told)
    for data in told.values():
        validator.validate(data)


def test_requests_that_it_allows_are_taken_and_others_refused(document, quick):
    """Both the server and the schema decide about each body."""
    body = document["paths"][GENERATIONS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = jsonschema.Draft202012Validator({**body, "components": document["components"]})
    bodies = [
        {"prompt": "3"}, {"class": 3, "n": 2, "seed": 1}, {"class": "3", "previews": 0}, {"prompt": None, "class": 1},
        {"class": 0, "n": 0}, {"class": 0, "n": "2"}, {"class": 0, "seed": -1}, {"class": [0]},
        {"class": 0, "colour": 1}, {"class": 0, "response_format": "gif"}, {"class": 0, "steps": 2.5},
        {"prompt": "x" * 9000},
    ]  # fmt: skip
    for each in bodies:
        taken = quick.ask(GENERATIONS, {"steps": 2, **each}).status == 200
        assert validator.is_valid(each) == taken, each
