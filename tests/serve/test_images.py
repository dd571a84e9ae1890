"""POST /v1/images/generations and the models: images, settings, refusals."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import numpy as np
import pytest

import support
from serve.client import GENERATIONS, pixels
from tqdit.engines.build.engine import build_engine
from tqdit.engines.bundle import write_manifest
from tqdit.engines.run.sampler import Sampler
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write


@pytest.fixture(scope="module")
def sampler(bundle):
    with Sampler.open(bundle) as opened:
        yield opened


def images_of(answer):
    assert answer.status == 200, answer.content
    return np.stack([pixels(base64.b64decode(each["b64_json"])) for each in answer.json["data"]])


def test_images_are_those_of_the_sampler_bit_for_bit(quick, sampler):
    body = {"class": 3, "seed": 7, "guidance_scale": 2.0, "n": 3, "steps": 9, "sampler": "ddim"}
    found = quick.ask(GENERATIONS, body)
    expected = sampler.sample([3, 3, 3], 2.0, seed=7, steps=9, sampler="ddim")
    np.testing.assert_array_equal(images_of(found), expected)
    settings = {"model": "tiny", "size": "8x8", "seed": 7, "guidance_scale": 2.0, "steps": 9, "sampler": "ddim"}
    assert found.json.items() >= settings.items()


def test_guidance_can_be_left_out_of_some_steps(quick, sampler):
    body = {"class": 3, "seed": 7, "steps": 6, "sampler": "ddim", "guidance_interval": [300, 700]}
    found = quick.ask(GENERATIONS, body)
    expected = sampler.sample([3], seed=7, steps=6, sampler="ddim", guidance_interval=(300, 700))
    np.testing.assert_array_equal(images_of(found), expected)
    assert found.json["guidance_interval"] == [300, 700]
    assert quick.ask(GENERATIONS, {"class": 3, "steps": 2}).json["guidance_interval"] is None
    refused = quick.ask(GENERATIONS, {**body, "guidance_interval": [700, 300]})
    assert (refused.status, refused.json["error"]["param"]) == (400, "guidance_interval")


def test_the_model_s_own_settings_are_the_defaults_and_are_told(quick, sampler):
    found = quick.ask(GENERATIONS, {"prompt": "2"})
    told, card = found.json, sampler.card
    assert (told["steps"], told["sampler"]) == (card.sampling.steps, card.sampling.sampler)
    assert told["guidance_scale"] == card.guidance.scale
    np.testing.assert_array_equal(images_of(found), sampler.sample([2], seed=told["seed"]))


def test_without_a_seed_two_requests_make_two_images(quick):
    seeds = {quick.ask(GENERATIONS, {"prompt": "2", "steps": 2}).json["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_null_is_a_field_that_is_left_out(quick, sampler):
    fields = (
        "prompt",
        "model",
        "n",
        "size",
        "response_format",
        "guidance_scale",
        "steps",
        "sampler",
        "previews",
        "stream",
    )
    found = quick.ask(GENERATIONS, {"class": 1, "seed": 1, **dict.fromkeys(fields)})
    np.testing.assert_array_equal(images_of(found), sampler.sample([1], seed=1))


def test_an_image_by_url_is_there_without_a_key_and_its_address_cannot_be_guessed(quick, sampler):
    body = {"class": 1, "seed": 5, "response_format": "url", "n": 2}
    first, second = (quick.ask(GENERATIONS, body).json["data"] for _ in range(2))
    addresses = [each["url"] for each in (*first, *second)]
    assert len(set(addresses)) == 4
    path = addresses[1].removeprefix(quick.url)
    assert path.startswith("/v1/images/")
    np.testing.assert_array_equal(pixels(quick.ask(path).content), sampler.sample([1, 1], seed=5)[1])
    for wrong in (path[:-5] + "7.png", path[:-5] + "9" * 5000 + ".png", path[:-1], "/v1/images/x/0.png"):
        assert quick.ask(wrong).error["code"] == "not_found"


def test_the_models_say_what_can_be_asked(quick, sampler):
    (entry,) = quick.ask("/v1/models").json["data"]
    assert entry["full_calls"] is None  # this engine has no forecasts
    card = sampler.card
    assert quick.ask("/v1/models/tiny").json == entry
    assert entry.items() >= {
        "id": "tiny", "object": "model", "kind": "class", "classes": 5, "size": "8x8", "steps": 20,
        "guidance_scale": card.guidance.scale, "batch": 16, "backend": "onnxruntime",
    }.items()  # fmt: skip
    assert {"ddpm", "ddim"} <= set(entry["samplers"])
    assert quick.ask("/v1/models/other").error["code"] == "unknown_model"


NO_JSON = [
    b"", b"{", b"\xff", b"[" * 16_000, [], 3, b'"\\ud800"', b'{"prompt": "\\ud800"}',
    b'{"prompt": "a\x00"}', b'{"class": 0, "guidance_scale": NaN}',
]  # fmt: skip
BAD = {
    "prompt": [{"prompt": each} for each in ("", "dog", "99", "-1", "٣٣", "9" * 5000, "x" * 9000, 3, ["3"])]
    + [{}, {"prompt": "1", "class": 1}],
    "class": [{"class": each} for each in (99, 5, -1, 10**30, "dog", True, 3.5, [3])] + [b'{"class":' + b"[" * 16_000],
    "seed": [{"class": 0, "seed": each} for each in (-1, 10**30, "7", 0.5)],
    "steps": [{"class": 0, "steps": each} for each in (0, "x", 1001, 10**9)],
    "sampler": [{"class": 0, "sampler": each} for each in ("x", "", 3)],
    "guidance_scale": [{"class": 0, "guidance_scale": each} for each in ("4", True, 1e9)]
    + [b'{"class": 0, "guidance_scale": 1e999}'],
    "guidance_interval": [{"class": 0, "guidance_interval": each} for each in ([1, "2"], [1], 3)]
    + [b'{"class": 0, "guidance_interval": [0, 1e999]}'],
    "full_calls": [{"class": 0, "full_calls": each} for each in (0, "3", 2, 4)],  # 4: this engine has no forecasts
    "n": [{"class": 0, "n": each} for each in (0, 17, 10**9, "2")],
    "size": [{"class": 0, "size": "1024x1024"}],
    "response_format": [{"class": 0, "response_format": "gif"}],
    "previews": [{"class": 0, "previews": 51}, {"class": 0, "previews": 1, "partial_images": 1}],
    "guidance": [{"class": 0, "guidance": 4}],
    "quality": [{"class": 0, "quality": "hd"}],
    "user": [{"class": 0, "user": 3}],
}
REFUSED = [(body, None) for body in NO_JSON] + [(body, param) for param, bodies in BAD.items() for body in bodies]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("path", [GENERATIONS, "/v1/jobs"])
def test_a_bad_request_is_told_the_field_at_fault(quick, path, body, param):
    answer = quick.ask(path, body)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
    assert answer.error["param"] == param
    assert answer.error["code"] in ("invalid_value", "invalid_json")
    assert "--" not in answer.error["message"]  # a flag of a command


def test_a_misspelt_field_is_named_and_a_right_request_shown(quick):
    message = quick.ask(GENERATIONS, {"class": 0, "guidance": 4}).error["message"]
    assert "`guidance`" in message
    example = message[message.index("{") :].rstrip(".")
    assert quick.ask(GENERATIONS, json.loads(example) | {"steps": 2}).status == 200


@pytest.fixture(scope="module")
def forecasting(tmp_path_factory):
    """An engine whose own chain has placed steps and forecasts."""
    folder = tmp_path_factory.mktemp("forecasting")
    write(folder / "m.onnx", *support.exported(ExportConfig(forecast=True), pixels=True))
    manifest = build_engine(folder / "m.onnx", folder / "m.engine")
    own = manifest.card.sampling.choose(
        sampler="dpm++2m", timesteps=(10, 60, 120, 180, 240, 300), full_calls=(0, 3, 4, 5)
    )
    write_manifest(folder / "m.engine", replace(manifest, card=replace(manifest.card, sampling=own)))
    return folder / "m.engine"


@pytest.mark.parametrize("asked", [{}, {"full_calls": 6}, {"full_calls": 3}, {"guidance_interval": [100, 200]}])
def test_the_settings_of_an_answer_make_its_images_again(serve, forecasting, asked):
    server = serve(m=forecasting)
    assert server.ask("/v1/models/m").json["full_calls"] == 4
    first = server.ask(GENERATIONS, {"class": 3, "seed": 7, **asked})
    with Sampler.open(forecasting) as opened:
        np.testing.assert_array_equal(images_of(first), opened.sample([3], seed=7, **asked))
    settings = ("seed", "guidance_scale", "guidance_interval", "steps", "sampler", "full_calls")
    again = server.ask(GENERATIONS, {"class": 3, **{name: first.json[name] for name in settings}})
    np.testing.assert_array_equal(images_of(again), images_of(first))
    with server.streaming(GENERATIONS, {"class": 3, "seed": 7, "stream": True, **asked}) as events:
        *_, (_, last) = events
    assert last.get("full_calls") == first.json["full_calls"]


def test_full_calls_that_a_sampler_cannot_have_are_the_field_at_fault(serve, forecasting):
    answer = serve(m=forecasting).ask(GENERATIONS, {"class": 0, "sampler": "heun", "full_calls": 4})
    assert (answer.status, answer.error["param"]) == (400, "full_calls")


def test_an_unknown_model_is_told_the_known_ones(quick):
    answer = quick.ask(GENERATIONS, {"model": "dall-e-3", "prompt": "3"})
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "unknown_model", "model")
    assert "tiny" in answer.error["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "x" * 5000])
def test_what_a_foreign_web_page_may_send_unasked_is_refused(quick, kind):
    answer = quick.ask(GENERATIONS, {"class": 0}, Content_Type=kind)
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")
    assert "access-control-allow-origin" not in quick.ask("/v1/models", Origin="http://evil.example").headers


PATHS = ("/v1", "/v1/", "/v1/models/", "//v1/models", "/v1/images/../models", "/..%2f..%2fetc/passwd", "/%00", "/%ff",
         "/v1/jobs/%2e%2e", "/v1/images/a/b/c", "/" + "a" * 9000, "/static/page.html", "/page.html")  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:30])
def test_a_path_that_is_not_there_is_not_found(quick, path):
    answer = quick.ask(path)
    assert (answer.status, answer.error["code"]) == (404, "not_found")


@pytest.mark.parametrize("host", ["[", "a b", "x/y?z", "x:y"])
def test_a_host_that_is_no_name_changes_no_answer(quick, host):
    assert quick.ask("/nowhere", Host=host).error["code"] == "not_found"
    assert quick.ask("/v1/models", Host=host).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", GENERATIONS), ("PUT", "/v1/models"), ("DELETE", "/"), ("POST", "/v1/jobs/x"), ("TRACE", "/")],
)
def test_a_method_that_is_not_there_is_refused(quick, method, path):
    answer = quick.ask(path, method=method)
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"]
