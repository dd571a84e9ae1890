"""Chains of two networks from the same noise, without an engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from support import tiny_model
from tables import Kind, make_table
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.shards import SamplingJob
from tqdit.errors import UsageError
from tqdit.evaluate.chains import check_comparable, run, run_pair
from tqdit.quantization.fake_quant import apply
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.process import Diffusion

JOB = SamplingJob("none", 4, "ddpm", (0, 3), 2.0, seed=5, count=5, shard_size=3)


def ignore() -> None:
    pass


@pytest.fixture(scope="module")
def model():
    return tiny_model(pixels=True)


@pytest.fixture(scope="module")
def pair(model):
    quantized = apply(model, make_table(model, Kind(weight_bits=4, activation_bits=6)))
    return Sampler(model.card(), model), Sampler(model.card(), quantized, batch=2)


def test_a_loaded_model_is_sampled_as_an_engine_is(pair):
    steps: list[None] = []
    chains = run(pair[0], JOB, lambda: steps.append(None))
    labels = np.array([0, 3, 0, 3, 0])
    expected = pair[0].sample_latents(labels, 2.0, 5, steps=4, sampler="ddpm")
    np.testing.assert_allclose(chains.latents, expected, rtol=1e-5, atol=1e-6)
    assert chains.pixels.shape == (5, 8, 8, 3)
    assert chains.step_errors is None
    assert len(steps) == 2 * 4  # two shards


def test_errors_of_every_step_are_against_the_same_noise(pair):
    """Whatever the batches are: the reference takes three images at once, the other one two."""
    reference, found = run_pair(*pair, JOB, ignore)
    assert found.step_errors.shape == (5, 4)
    energy = np.square(reference.latents.astype(np.float64)).reshape(5, -1).sum(1)
    difference = np.square(found.latents.astype(np.float64) - reference.latents).reshape(5, -1).sum(1)
    np.testing.assert_allclose(found.step_errors[:, 0], difference / energy)
    assert (found.step_errors > 0).all()
    same, again = run_pair(pair[0], pair[0], JOB, ignore)
    np.testing.assert_array_equal(again.step_errors, 0)
    np.testing.assert_array_equal(same.latents, reference.latents)


def test_a_model_without_classes_and_guidance(model):
    label = model.signature.label
    signature = replace(model.signature, ports=tuple(port for port in model.signature.ports if port != label))

    def network(inputs):
        return model({**inputs, label.name: np.zeros(len(inputs["x"]), np.int64)})

    sampler = Sampler(replace(model, signature=signature, guidance=None).card(), network)
    found = run(sampler, replace(JOB, classes=(), guidance_scale=None), ignore)
    assert found.latents.shape == (5, 3, 8, 8)
    assert len(np.unique(found.latents.reshape(5, -1), axis=0)) == 5


def test_steps_sampler_and_scale_may_differ_between_the_files_of_two_engines(model):
    other = model.card(sampling=model.sampling.choose(7, "ddim"), guidance=replace(model.guidance, scale=4.0))
    check_comparable(model.card(), other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"guidance": None}, "guidance: of all channels and none"),
        ({"guidance": Guidance(1.5, channels=2)}, "guidance: of all channels and of 2 channels"),
        ({"process": Diffusion(beta_end=0.012)}, r"process: .*0\.02.*0\.012"),
    ],
)
def test_chains_that_differ_by_more_than_quantization_are_refused(model, changes, message):
    card = model.card()
    if "process" in changes:
        changes = {"sampling": replace(card.sampling, process=changes["process"])}
    with pytest.raises(UsageError, match=message):
        check_comparable(card, replace(card, **changes))
