"""The runtime: right images, the same images however they are batched, and clear refusals."""

import threading

import numpy as np
import pytest

import support
from tables import Kind, make_table
from tqdit.calibrate import apply
from tqdit.engines.run.sampler import Sampler, to_pixels
from tqdit.errors import SamplingError, SamplingStopped, UsageError
from tqdit.sampling import noise

LABELS = [0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("origin", ["published", pytest.param("diffusers", marks=pytest.mark.slow)])
@pytest.mark.parametrize("guided", [True, False])
def test_a_sampled_chain_equals_pytorch_plus_numpy(bundle_of, origin, guided):
    """20 steps; float32 in another order than PyTorch's: 2e-4 of the largest value, as for the graph itself."""
    model = support.tiny_model(origin, pixels=True)
    scale = 2.0 if guided else None
    with Sampler.open(bundle_of(origin, guided=guided)) as sampler:
        x = sampler.sample_latents(LABELS, scale, seed=5)
        spec = sampler.card.sampling
    expected = support.reference_chain(model, spec, np.array(LABELS), scale, seed=5)
    np.testing.assert_allclose(x, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 3, 16])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_image_does_not_change_with_batch_or_threads_bit_for_bit(bundle_of, guided, batch, threads):
    folder = bundle_of(guided=guided)
    with Sampler.open(folder, batch=7) as one, Sampler.open(folder, batch=batch, threads=threads) as other:
        np.testing.assert_array_equal(one.sample_latents(LABELS, seed=1), other.sample_latents(LABELS, seed=1))


@pytest.mark.parametrize("attention", ["simulated", "integer"])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_int8_image_does_not_change_with_batch_or_threads_bit_for_bit(bundle_of, attention, threads):
    folder = bundle_of(kind=Kind(asymmetric=True, groups=10, everywhere=True), attention=attention)
    with Sampler.open(folder, batch=7) as one, Sampler.open(folder, batch=2, threads=threads) as other:
        np.testing.assert_array_equal(one.sample_latents(LABELS, seed=1), other.sample_latents(LABELS, seed=1))


@pytest.mark.parametrize("attention", ["simulated", "integer"])
def test_an_int8_chain_follows_the_fake_quantized_model(bundle_of, attention):
    """20 steps; a code flipped on a rounding tie moves a chain of this coarse model: at most 2 of 7, by 10 %."""
    kind = Kind(groups=10)
    model = support.tiny_model(pixels=True)
    with Sampler.open(bundle_of(kind=kind, attention=attention)) as sampler:
        x = sampler.sample_latents(LABELS, 2.0, seed=5)
        spec = sampler.card.sampling
    quantized = apply(model, make_table(model, kind))
    expected = support.reference_chain(quantized, spec, np.array(LABELS), 2.0, seed=5)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(x, expected, strict=True)]
    assert sum(error > 1e-4 for error in errors) <= 2
    assert max(errors) <= 0.1


def test_an_image_does_not_change_with_its_neighbours_or_their_order(bundle):
    with Sampler.open(bundle, batch=3) as sampler:
        together = sampler.sample_latents(LABELS, seed=2)
        for index in (6, 0, 3):
            alone = sampler.sample_latents([LABELS[index]], seed=2, first_image=index)
            np.testing.assert_array_equal(alone[0], together[index])


def test_workers_in_parallel_threads_give_the_images_of_one(bundle):
    with Sampler.open(bundle) as sampler:
        expected = sampler.sample(LABELS, seed=3)
        results = {}

        def work(index):
            results[index] = sampler.sample([LABELS[index]], seed=3, first_image=index)[0]

        workers = [threading.Thread(target=work, args=(index,)) for index in range(len(LABELS))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    np.testing.assert_array_equal(np.stack([results[index] for index in range(len(LABELS))]), expected)


def test_seed_class_and_guidance_each_change_the_image(bundle):
    with Sampler.open(bundle) as sampler:
        base = sampler.sample_latents([1], 2.0, seed=0)
        for labels, scale, seed in [([2], 2.0, 0), ([1], 3.0, 0), ([1], 2.0, 1)]:
            assert np.abs(sampler.sample_latents(labels, scale, seed=seed) - base).max() > 1e-3


@pytest.mark.parametrize("threads", [0, -1])
def test_a_number_of_threads_below_one_is_refused(bundle, threads):
    with pytest.raises(UsageError, match=f"threads is {threads}; it must be at least 1."):
        Sampler.open(bundle, threads=threads)


def test_the_engine_is_given_the_projects_noise_whatever_the_batch(bundle):
    """A recording engine stands for any backend: what it is fed does not depend on the backend."""
    with Sampler.open(bundle) as sampler:
        card = sampler.card
    seen = {}

    class Recorder:
        def __call__(self, inputs):
            for row in range(len(inputs["x"])):
                image = int(inputs["class_labels"][row])  # labels 0..4 number the images here
                seen.setdefault((image, int(inputs["step"][row])), []).append(inputs["noise"][row].copy())
            return np.zeros_like(inputs["x"])

        def close(self):
            pass

    for batch in (1, 2, 5):
        Sampler(card, Recorder(), batch=batch).sample_latents([0, 1, 2, 3, 4], seed=9)
    assert len(seen) == 5 * 20
    for (image, step), values in seen.items():
        assert len(values) == 3
        expected = noise.normal(9, image, step, card.image_shape)
        for value in values:
            if step > 0:  # the last step adds no noise, so what it is fed there does not matter
                np.testing.assert_array_equal(value, expected)


def test_a_callback_sees_every_step_and_can_stop(bundle):
    with Sampler.open(bundle, batch=4) as sampler:
        reports = []
        sampler.sample(LABELS, callback=reports.append)
        assert [report.step for report in reports] == 2 * list(reversed(range(20)))
        assert [report.images for report in reports[::20]] == [range(4), range(4, 7)]
        assert len(reports) == sampler.steps_for(len(LABELS))
        with pytest.raises(SamplingStopped, match="step 10"):
            sampler.sample(LABELS, callback=lambda report: report.step == 10)


def test_a_callback_may_keep_the_states(bundle):
    with Sampler.open(bundle) as sampler:
        kept = []
        last = sampler.sample_latents([0, 1], callback=lambda report: kept.append(report.x))
    assert len({state.tobytes() for state in kept}) == len(kept) == 20
    np.testing.assert_array_equal(kept[-1], last)


def test_images_are_uint8_nhwc_rounded_as_dit_does(bundle):
    values = np.array([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0], np.float32).reshape(1, 1, 2, 3).repeat(3, axis=1)
    assert to_pixels(values)[0, :, :, 0].ravel().tolist() == [0, 0, 128, 255, 255, 255]
    with Sampler.open(bundle) as sampler:
        images = sampler.sample([0, 1])
    assert images.shape == (2, 8, 8, 3)
    assert images.dtype == np.uint8


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([6], r"class 6 is out of range; this model knows 0\.\.4"),
        ([-1], "class -1"),
        ([], "non-empty"),
        ([0.5], "integers"),
    ],
)
def test_impossible_labels_are_refused(bundle, labels, message):
    with Sampler.open(bundle) as sampler, pytest.raises(UsageError, match=message):
        sampler.sample(labels)


def test_the_null_class_samples_without_a_class(bundle):
    with Sampler.open(bundle) as sampler:
        one, two = sampler.sample_latents([5], 1.0), sampler.sample_latents([5], 7.0)
    np.testing.assert_allclose(one, two, atol=1e-3)  # guidance has nothing to move; cancellation leaves rounding


def test_nan_is_reported_with_image_class_and_step(bundle):
    with Sampler.open(bundle) as sampler:
        card = sampler.card

    class Breaks:
        def __call__(self, inputs):
            x = inputs["x"].copy()
            if inputs["step"][0] == 12:
                x[1, 0, 0, 0] = np.nan
            return x

        def close(self):
            pass

    with pytest.raises(SamplingError, match=r"image 1 \(class 4\) became NaN or infinite at step 12"):
        Sampler(card, Breaks()).sample([0, 4, 2])


def test_a_guidance_scale_that_is_no_number_or_has_no_input_is_refused(bundle, bundle_of):
    with Sampler.open(bundle) as sampler, pytest.raises(UsageError, match="nan is not a finite number"):
        sampler.sample([0], float("nan"))
    with Sampler.open(bundle_of(guided=False)) as sampler, pytest.raises(UsageError, match="--unguided"):
        sampler.sample([0], 2.0)


def test_latents_without_a_decoder_are_no_images(bundle_of):
    with Sampler.open(bundle_of(pixels=False)) as sampler:
        assert not sampler.makes_images
        with pytest.raises(UsageError, match="no decoder"):
            sampler.sample([0])
        assert sampler.sample_latents([0]).shape == (1, 4, 8, 8)


@pytest.mark.slow
def test_a_denoiser_engine_cannot_sample(bundle_of):
    with pytest.raises(UsageError, match="denoiser graph"):
        Sampler.open(bundle_of(graph="denoiser"))


def test_a_closed_sampler_says_so_and_can_be_opened_again(bundle):
    sampler = Sampler.open(bundle)
    expected = sampler.sample([0])
    sampler.close()
    sampler.close()
    with pytest.raises(UsageError, match="closed"):
        sampler.sample([0])
    with Sampler.open(bundle) as again:
        np.testing.assert_array_equal(again.sample([0]), expected)
