"""Engines of each kind: classes by name, text, unconditional; and which engines are not served."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageSequence

from serve.client import GENERATIONS, echo, pixels, text_app, toy_service
from tqdit.card import Latents, VaeCard
from tqdit.engines.bundle import read_manifest
from tqdit.errors import FileFormatError, UsageError
from tqdit.ports import Port
from tqdit.serve.app import make_app
from tqdit.serve.engines import kind_of_engine
from tqdit.serve.settings import Settings

NAMES = ("tench, Tinca tinca", "Golden Retriever", "crane", "crane", "7")


@pytest.fixture(scope="module")
def manifest(bundle):
    return read_manifest(bundle)


def drawn(answer):
    assert answer.status == 200, answer.content
    return pixels(base64.b64decode(answer.json["data"][0]["b64_json"]))


def test_a_class_is_asked_for_by_name_by_a_part_of_it_or_by_number(serve, manifest):
    card = replace(manifest.card, class_names=NAMES)
    running = serve(toy_service(card, echo(card, "class_labels"), Settings()))

    def image(**fields):
        return drawn(running.ask(GENERATIONS, {"seed": 1, **fields}))

    expected = [image(**{"class": number}) for number in range(5)]
    assert len({each.tobytes() for each in expected}) == 5
    for fields, number in (
        ({"prompt": "tench, Tinca tinca"}, 0), ({"prompt": "  TINCA  tinca "}, 0), ({"prompt": "golden retriever"}, 1),
        ({"class": "Golden Retriever"}, 1), ({"prompt": "7"}, 4), ({"prompt": "2"}, 2), ({"class": 4}, 4),
    ):  # fmt: skip
        np.testing.assert_array_equal(image(**fields), expected[number])
    refused = running.ask(GENERATIONS, {"prompt": "golden retreiver"}).error
    assert "golden retriever" in refused["message"]
    for fields in ({"prompt": "Crane"}, {"class": "crane"}):  # two classes have this name
        refused = running.ask(GENERATIONS, fields).error
        assert refused["param"] in fields
        assert "2, 3" in refused["message"]
    assert running.ask("/v1/models/toy").json["class_names"] == list(NAMES)


@pytest.fixture(scope="module")
def texts(serve, manifest):
    return serve(text_app(manifest))


def test_a_prompt_is_encoded_once_and_drawn(texts):
    assert texts.ask("/v1/models/toy").json["kind"] == "text"
    one, same, other = (drawn(texts.ask(GENERATIONS, {"prompt": text, "seed": 1})) for text in ("ab", "ba", "abcdef"))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize("body", [{}, {"prompt": ""}, {"prompt": " \n"}, {"prompt": "a" * 30}], ids=str)
def test_a_prompt_that_is_missing_or_too_long_is_refused(texts, body):
    answer = texts.ask(GENERATIONS, body)
    assert (answer.status, answer.error["param"]) == (400, "prompt")


def test_a_class_is_no_prompt_and_an_encoder_s_failure_shows_no_path(texts):
    assert texts.ask(GENERATIONS, {"class": 1}).error["param"] == "class"
    answer = texts.ask(GENERATIONS, {"prompt": "broken"})
    assert (answer.status, answer.error["code"]) == (500, "internal")


def test_an_unconditional_engine_takes_no_prompt(serve, manifest):
    ports = tuple(port for port in manifest.card.signature.ports if port.kind != "request")
    card = replace(manifest.card, signature=replace(manifest.card.signature, ports=ports), guidance=None)
    running = serve(
        toy_service(
            card,
            lambda x: np.zeros((len(x["x"]), *card.signature.output_shape), np.float32),
            Settings(),
            "unconditional",
        )
    )
    assert drawn(running.ask(GENERATIONS, {"prompt": ""})).shape == (8, 8, 3)
    assert running.ask(GENERATIONS, {}).json["guidance_scale"] is None
    assert running.ask(GENERATIONS, {"prompt": "dog"}).error["param"] == "prompt"
    assert running.ask(GENERATIONS, {"guidance_scale": 2.0}).error["param"] == "guidance_scale"


def test_a_video_is_an_animated_png_and_its_previews_are_pictures(serve, manifest):
    """Of a toy whose decoder makes five frames of each state, one brighter than the other."""
    card = replace(manifest.card, latents=Latents(1.0), vae=VaeCard("vae.onnx", "0" * 64, 8, 8, frames=5))

    def decode(inputs):
        return inputs["latents"][:, :, None] * 0 + np.linspace(-1, 1, 5, dtype=np.float32)[:, None, None]

    running = serve(toy_service(card, echo(card, "class_labels"), Settings(), decoder=decode))
    answer = running.ask(GENERATIONS, {"class": 1})
    assert answer.json["size"] == "8x8"
    with Image.open(io.BytesIO(base64.b64decode(answer.json["data"][0]["b64_json"]))) as video:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(video)]
    assert [int(frame.mean()) for frame in frames] == [0, 64, 128, 191, 255]
    with running.streaming(GENERATIONS, {"class": 1, "steps": 1000, "stream": True, "previews": 3}) as events:
        (preview, *_) = (data for name, data in events if name.endswith("partial_image"))
    assert pixels(base64.b64decode(preview["b64_json"])).mean() == 128


def test_two_engines_are_two_models_and_the_first_is_the_default(serve, bundle, bundle_of):
    running = serve(one=bundle, two=bundle_of(steps=1000))
    assert [each["id"] for each in running.ask("/v1/models").json["data"]] == ["one", "two"]
    found = [
        running.ask(GENERATIONS, {"class": 1, "steps": 2, **which}).json["model"] for which in ({}, {"model": "two"})
    ]
    assert found == ["one", "two"]


def test_engines_that_no_request_could_speak_of_are_refused(tmp_path, bundle, manifest):
    card = manifest.card
    ports = (*card.signature.ports, Port("text", "request", "float32", (None, 2)))
    for changed, message in (
        (replace(card, latents=Latents(1.0)), "no decoder"), (replace(card, graph="step"), "step graph"),
        (replace(card, signature=replace(card.signature, ports=ports)), "no text encoders"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            kind_of_engine(bundle, replace(manifest, card=changed))
    with pytest.raises(FileFormatError, match="no such engine"):
        make_app({"tiny": bundle, "other": tmp_path / "nothing.engine"})
    with pytest.raises(UsageError, match="no engine is named"):
        make_app({})
    for name in ("", "a/b", "a b", "x" * 101):
        with pytest.raises(UsageError, match="no name for an engine"):
            make_app({name: bundle})


def test_a_server_that_cannot_open_one_engine_closes_the_others(bundle, tmp_path):
    import threading

    before = {thread.name for thread in threading.enumerate()}
    with pytest.raises(FileFormatError):
        make_app({"tiny": bundle, "other": tmp_path})
    assert {thread.name for thread in threading.enumerate()} == before
