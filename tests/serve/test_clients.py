"""OpenAI's own client, and what the command loads."""

from __future__ import annotations

import base64
import subprocess
import sys

import numpy as np
import pytest

from serve.client import pixels
from support import wait_until
from tqdit.engines.run.sampler import Sampler
from tqdit.serve.settings import Settings

KEY = "a-key-of-this-test"


@pytest.fixture(scope="module")
def running(serve, bundle_of):
    return serve(settings=Settings(api_key=KEY, queue=4, batch=1), tiny=bundle_of(steps=1000))


@pytest.fixture(scope="module")
def openai():
    """Imported by the first test that needs it: it takes seconds."""
    import openai

    return openai


@pytest.fixture(scope="module")
def client(running, openai):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.mark.slow
def test_openai_s_client_makes_images(client, bundle_of):
    made = client.images.generate(
        model="tiny", prompt="3", n=2, size="8x8", response_format="b64_json",
        extra_body={"seed": 7, "steps": 5, "guidance_scale": 2.0, "sampler": "ddim"},
    )  # fmt: skip
    with Sampler.open(bundle_of(steps=1000)) as sampler:
        expected = sampler.sample([3, 3], 2.0, seed=7, steps=5, sampler="ddim")
    np.testing.assert_array_equal([pixels(base64.b64decode(each.b64_json)) for each in made.data], expected)
    assert made.seed == 7


@pytest.mark.slow
def test_openai_s_client_lists_the_models(client):
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").steps == 1000


@pytest.mark.slow
def test_openai_s_client_sees_partial_images(client):
    with client.images.generate(prompt="3", stream=True, partial_images=3) as stream:
        events = list(stream)
    *partial, last = events
    assert last.type == "image_generation.completed"
    assert 1 <= len(partial) <= 3
    assert [each.partial_image_index for each in partial] == [*range(len(partial))]
    assert pixels(base64.b64decode(last.b64_json)).shape == (8, 8, 3)


@pytest.mark.slow
def test_openai_s_client_knows_our_refusals(client, running, openai):
    wrong = {
        openai.BadRequestError: {"prompt": "no such class"},
        openai.NotFoundError: {"prompt": "3", "model": "dall-e-3"},
    }
    for error, arguments in wrong.items():
        with pytest.raises(error) as caught:
            client.images.generate(**arguments)
        assert caught.value.param in ("prompt", "model")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0).models.list()
    right = {"Authorization": f"Bearer {KEY}"}
    jobs = [running.ask("/v1/jobs", {"class": 1}, **right).json["id"] for _ in range(5)]
    with pytest.raises(openai.RateLimitError) as full:
        client.images.generate(prompt="3")
    assert int(full.value.response.headers["retry-after"]) >= 1
    for job in jobs:
        running.ask(f"/v1/jobs/{job}", method="DELETE", **right)
    wait_until(lambda: running.running() == 0)


@pytest.mark.slow
def test_openai_s_client_that_gives_up_frees_the_places(client, running, openai):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.1).images.generate(prompt="3", n=5)
    wait_until(lambda: running.running() == 0, 5)


@pytest.mark.slow
def test_serving_loads_neither_torch_nor_onnx_nor_diffusers(bundle):
    program = f"""
import sys
sys.modules |= dict.fromkeys(("torch", "onnx", "onnx_ir", "diffusers", "transformers", "safetensors"))
from tqdit.cli import main
from tqdit.serve.app import make_app
app = make_app({{"tiny": {str(bundle)!r}}})
main._load("serve")
parts = ("torch", "onnx.", "google", "tqdit.engines.build", "tqdit.models", "tqdit.exporter", "tqdit.calibration")
print(*(name for name in sys.modules if name.startswith(parts) and sys.modules[name]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
