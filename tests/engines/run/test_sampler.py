"""The runtime: right images, the same images however they are batched, and clear refusals."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import support
from tables import Kind, make_table
from tqdit.card import GraphCard, Latents
from tqdit.engines.bundle import read_manifest
from tqdit.engines.config import BatchRange
from tqdit.engines.run.sampler import Sampler, choose_batch, to_pixels
from tqdit.engines.run.step_batcher import StepBatcher
from tqdit.errors import FileFormatError, SamplingError, SamplingStopped, UsageError
from tqdit.ports import Port, Signature
from tqdit.quantization.fake_quant import apply
from tqdit.sampling import noise
from tqdit.sampling.process import Flow
from tqdit.sampling.schedule import SamplingSpec

LABELS = [0, 1, 2, 3, 4, 0, 1]


@pytest.fixture(scope="module")
def card(bundle):
    """Of a pixel model: DDPM, 20 steps, guided, 5 classes, 3x8x8."""
    return read_manifest(bundle).card


@pytest.mark.parametrize("origin", ["published", pytest.param("diffusers", marks=pytest.mark.slow)])
@pytest.mark.parametrize("guided", [True, False])
def test_a_sampled_chain_equals_pytorch_plus_numpy(bundle_of, origin, guided):
    """20 steps; float32 in another order than PyTorch's: 2e-4 of the largest value, as for the graph itself."""
    pixels = origin == "published"  # traced for other tests as well
    model = support.tiny_model(origin, pixels=pixels)
    scale = 2.0 if guided else None
    with Sampler.open(bundle_of(origin, pixels, guided=guided)) as sampler:
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


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["simulated", "integer"])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_int8_image_does_not_change_with_batch_or_threads_bit_for_bit(bundle_of, attention, threads):
    folder = bundle_of(kind=Kind(asymmetric=True, groups=10, everywhere=True), attention=attention)
    with Sampler.open(folder, batch=7) as one, Sampler.open(folder, batch=2, threads=threads) as other:
        np.testing.assert_array_equal(one.sample_latents(LABELS, seed=1), other.sample_latents(LABELS, seed=1))


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_loaded_model_is_a_network_too():
    """Without an engine: the same images as the reference's chain."""
    model = support.tiny_model("diffusers", pixels=True)
    x = Sampler(model.card(), model, batch=4).sample_latents(LABELS, 2.0, seed=5)
    expected = support.reference_chain(model, model.sampling, np.array(LABELS), 2.0, seed=5)
    np.testing.assert_allclose(x, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_seed_class_and_guidance_each_change_the_image(bundle):
    with Sampler.open(bundle) as sampler:
        base = sampler.sample_latents([1], 2.0, seed=0)
        for labels, scale, seed in [([2], 2.0, 0), ([1], 3.0, 0), ([1], 2.0, 1)]:
            assert np.abs(sampler.sample_latents(labels, scale, seed=seed) - base).max() > 1e-3


@pytest.mark.parametrize("arguments", [
    {"seed": 1.5}, {"seed": "7"}, {"seed": True}, {"first_image": 0.5}, {"steps": 2.5}, {"guidance_scale": "4"},
    {"guidance_scale": True}, {"guidance_scale": 1e38},
])  # fmt: skip
def test_what_is_no_number_of_its_kind_is_refused_and_not_rounded(bundle, arguments):
    (name,) = arguments
    with Sampler.open(bundle) as sampler, pytest.raises(UsageError, match=r"expected a .* number"):
        sampler.sample([0], **arguments)
    with StepBatcher(bundle) as batcher, pytest.raises(UsageError, match=r"expected a .* number"):
        batcher.submit(0, **{"image_index" if name == "first_image" else name: arguments[name]})


@pytest.mark.parametrize("arguments", [{"threads": 10**8}, {"threads": 0.5}, {"batch": 10**9}, {"batch": 1.5}])
def test_counts_that_no_engine_has_are_refused_before_it_is_opened(bundle, monkeypatch, arguments):
    monkeypatch.setattr("tqdit.engines.run.backend.runner", None)
    with pytest.raises(UsageError, match=f"{next(iter(arguments))} is .*expected a whole number from 1 to"):
        Sampler.open(bundle, **arguments)


def test_images_that_do_not_fit_into_memory_are_refused(bundle, monkeypatch):
    monkeypatch.setattr("tqdit.bounds.memory_left", lambda: 2000)
    with Sampler.open(bundle) as sampler:
        assert sampler.sample([0, 1], steps=1).shape == (2, 8, 8, 3)
        with pytest.raises(UsageError, match="3 images at once"):
            sampler.sample([0, 1, 2])


@pytest.mark.parametrize("threads", [0, -1])
def test_a_number_of_threads_below_one_is_refused(bundle, threads):
    with pytest.raises(UsageError, match=f"threads is {threads}; expected .* from 1 to 1024"):
        Sampler.open(bundle, threads=threads)


def test_what_an_engine_is_fed_does_not_depend_on_the_batch(card):
    """A recording engine stands for any backend."""
    seen = {}

    def record(inputs):
        x, rows = inputs["x"], len(inputs["x"]) // 2
        for row in range(rows):
            image = int(inputs["class_labels"][row])  # labels 0..4 number the images here
            seen.setdefault((image, int(inputs["timestep"][row])), []).append(x[row].copy())
            np.testing.assert_array_equal(x[row], x[rows + row])
        assert inputs["class_labels"][rows:].tolist() == rows * [5]
        return np.concatenate([0.5 * x, np.zeros_like(x)], axis=1)

    for batch in (1, 2, 5):
        Sampler(card, record, batch=batch).sample_latents([0, 1, 2, 3, 4], seed=9)
    assert len(seen) == 5 * 20
    for (image, timestep), values in seen.items():
        assert len(values) == 3
        for value in values:
            np.testing.assert_array_equal(value, values[0])
            if timestep == 999:
                np.testing.assert_array_equal(value, noise.normal(9, image, noise.INITIAL, card.state_shape))


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "sampler"), [(7, None), (None, "ddim"), (250, "ddim"), (50, "ddpm")])
def test_steps_and_sampler_are_chosen_per_call(bundle, card, steps, sampler):
    """Against the papers' formulas around the PyTorch network; the next call is as the card proposes again."""
    model, labels = support.tiny_model(pixels=True), np.array([0, 3])
    with Sampler.open(bundle) as ours:
        chosen = ours.sample_latents(labels, 2.0, 5, steps=steps, sampler=sampler)
        usual = ours.sample_latents(labels, 2.0, 5)
    for found, chain in ((chosen, card.sampling.choose(steps, sampler)), (usual, card.sampling)):
        expected = support.reference_chain(model, chain, labels, 2.0, seed=5)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


PLACED = (40.0, 310.0, 620.0, 999.0)


@pytest.mark.slow
def test_placed_steps_of_the_card_are_the_default_and_another_chain_is_chosen_by_name(bundle, card):
    placed = replace(card, sampling=card.sampling.choose(sampler="ddim", timesteps=PLACED), published=card.sampling)
    model, labels = support.tiny_model(pixels=True), np.array([0, 3])
    with Sampler.open(bundle) as opened:
        ours = Sampler(placed, opened.predict)
        usual = ours.sample_latents(labels, 2.0, 5)
        named = ours.sample_latents(labels, 2.0, 5, steps=4, sampler="ddim")
        np.testing.assert_array_equal(usual, named)
        np.testing.assert_array_equal(usual, opened.sample_latents(labels, 2.0, 5, sampler="ddim", timesteps=PLACED))
        with StepBatcher(ours, batch=2) as batcher:
            alone = batcher.submit(3, guidance_scale=2.0, seed=5, image_index=1).result(60)
        np.testing.assert_array_equal(alone, ours.to_images(usual[1:])[0])
        for other in ({"timesteps": ()}, {"steps": 6}, {"steps": 20, "sampler": "ddpm"}):
            found = ours.sample_latents(labels, 2.0, 5, **other)
            expected = support.reference_chain(model, placed.sampling.choose(**other), labels, 2.0, seed=5)
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())
            assert np.abs(found - usual).max() > 0.01


def test_outside_the_guidance_interval_an_image_is_that_of_its_conditional_rows(bundle):
    """Guidance scale 1 is no guidance; an interval that holds no timestep gives the same with half the rows."""
    rows = []
    with Sampler.open(bundle, batch=3) as ours:

        def count(inputs):
            rows.append(len(inputs["x"]))
            return ours.predict(inputs)

        counted = Sampler(ours.card, count, batch=3)
        chain = {"steps": 5, "sampler": "ddim"}
        without = counted.sample_latents(LABELS[:3], 3.0, 5, guidance_interval=(2000, 3000), **chain)
        assert rows == 5 * [3]
        np.testing.assert_allclose(without, ours.sample_latents(LABELS[:3], 1.0, 5, **chain), rtol=0, atol=1e-3)
        every = ours.sample_latents(LABELS[:3], 3.0, 5, guidance_interval=(0, 999), **chain)
        np.testing.assert_array_equal(every, ours.sample_latents(LABELS[:3], 3.0, 5, **chain))
        half = ours.sample_latents(LABELS[:3], 3.0, 5, guidance_interval=(200, 800), **chain)
        assert min(np.abs(half - other).max() for other in (without, every)) > 0.01


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_an_image_with_an_interval_does_not_change_with_its_neighbours_bit_for_bit(bundle_of, batch):
    """On an int8 engine; in a batcher, images inside and outside the interval share calls."""
    interval = {"steps": 6, "sampler": "ddim", "guidance_interval": (300.0, 700.0)}
    with Sampler.open(bundle_of(kind=Kind(asymmetric=True, groups=10, everywhere=True)), batch=batch) as sampler:
        expected = sampler.sample(LABELS, 2.0, 4, **interval)
        other = sampler.sample([1], 2.0, 4, steps=9)
        with StepBatcher(sampler) as batcher:
            beside = batcher.submit(1, guidance_scale=2.0, seed=4, steps=9)
            found = [
                batcher.submit(label, guidance_scale=2.0, seed=4, image_index=image, **interval)
                for image, label in enumerate(LABELS)
            ]
            np.testing.assert_array_equal(np.stack([future.result(60) for future in found]), expected)
            np.testing.assert_array_equal(beside.result(60), other[0])


def test_an_interval_that_an_engine_cannot_do_is_refused(bundle, bundle_of, card):
    asked = {"guidance_interval": (200, 800)}
    for refusing in (
        Sampler(replace(card, guidance=None), dict),
        Sampler(replace(card, rows=2), dict),
        Sampler(card, dict, any_rows=False),
    ):
        with pytest.raises(UsageError, match=r"without guidance|numbers of rows"):
            refusing.sample_latents([0], **asked)
        with StepBatcher(refusing) as batcher, pytest.raises(UsageError, match=r"without guidance|numbers of rows"):
            batcher.submit(0, **asked)
    with Sampler.open(bundle) as sampler, pytest.raises(UsageError, match=r"\(800, 200\)"):
        sampler.sample_latents([0], guidance_interval=(800, 200))


@pytest.mark.parametrize(
    ("chain", "message"),
    [({"steps": 0}, "^steps is 0"), ({"steps": 1001}, "1 to 1000"), ({"sampler": "euler"}, "known are ddim, ddpm")],
)
def test_a_chain_that_the_model_does_not_have_is_refused(bundle, chain, message):
    with Sampler.open(bundle) as sampler, pytest.raises(UsageError, match=message):
        sampler.sample([0], **chain)


def toy(*requests, shape=(3, 8, 8), **changes):
    """A sampler of another kind of network: velocity, fractional time, no guidance; its states end at `pull`."""
    ports = (Port("latent", "state", "float32", (None, *shape)), Port("sigma", "time", "float32", (None,)), *requests)
    card = GraphCard(
        graph="denoiser", signature=Signature(ports, (None, *shape), "Toy"), guidance=None, latents=None,
        class_names=(), sampling=SamplingSpec(Flow(1.0), "euler", 4), model="toy",
        origin="test", fingerprint="", written_by="test",
    )  # fmt: skip

    def network(inputs):
        column = (-1, *len(shape) * [1])
        pull = sum((inputs[port.name].reshape(len(inputs["sigma"]), -1).mean(axis=1) for port in requests), 0.25)
        pull, sigma = (np.resize(values, len(inputs["sigma"])).reshape(column) for values in (pull, inputs["sigma"]))
        velocity = (inputs["latent"] - pull) / sigma
        return velocity.astype(np.float32)

    return Sampler(replace(card, **changes), network)


def test_an_unconditional_model_takes_a_number_of_images():
    with toy() as sampler:
        x = sampler.sample_latents(19, seed=1)  # more than a batch
        np.testing.assert_allclose(x, 0.25, atol=1e-6)
        assert x.shape == (19, 3, 8, 8)
        np.testing.assert_array_equal(sampler.sample(2), np.full((2, 8, 8, 3), 159))
        with pytest.raises(UsageError, match="Toy is unconditional"):
            sampler.sample([1, 2])
        with pytest.raises(UsageError, match="without guidance"):
            sampler.sample(1, 2.0)


def test_a_model_with_several_request_ports_takes_a_dict_of_arrays():
    ports = Port("text", "request", "float32", (None, 2, 3)), Port("label", "request", "int64", (None,), values=4)
    text, labels = np.linspace(0, 1, 19 * 6).reshape(19, 2, 3), np.arange(19) % 4
    with toy(*ports) as sampler, StepBatcher(sampler, batch=3) as batcher:
        x = sampler.sample_latents({"text": text, "label": labels})
        expected = 0.25 + text.mean(axis=(1, 2)) + labels
        np.testing.assert_allclose(x, np.broadcast_to(expected.reshape(-1, 1, 1, 1), x.shape), atol=1e-5)
        future = batcher.submit({"text": text[7], "label": 3}, image_index=7)
        np.testing.assert_array_equal(future.result(60), sampler.to_images(x[7:8])[0])


def test_states_that_are_no_pictures_have_no_images():
    with toy(shape=(2, 5)) as sampler:
        assert not sampler.makes_images
        assert sampler.sample_latents(2).shape == (2, 2, 5)
        with pytest.raises(UsageError, match=r"states of shape \(2, 5\), .* Use sample_latents"):
            sampler.sample(2)


def test_grey_images_become_rgb():
    with toy(shape=(1, 4, 4)) as sampler:
        np.testing.assert_array_equal(sampler.sample(1), np.full((1, 4, 4, 3), 159))
    with pytest.raises(FileFormatError, match=r"\[1, 2, 4, 4\], expected \(N, 1 or 3, H, W\)"):
        to_pixels(np.zeros((1, 2, 4, 4), np.float32))


def test_a_decoder_makes_the_images_of_a_latent_model():
    """One state at a time, as it is: its scale is inside the decoder's graph."""
    seen = []

    def decode(inputs):
        seen.append(inputs["latents"].shape)
        return np.full((1, 3, 16, 16), inputs["latents"].mean(), np.float32)

    latent = toy(shape=(4, 8, 8), latents=Latents(0.18215))
    with Sampler(latent.card, latent.predict, decode) as sampler:
        np.testing.assert_array_equal(sampler.sample(2), np.full((2, 16, 16, 3), 159))
    assert seen == [(1, 4, 8, 8)] * 2


@pytest.mark.parametrize(
    ("built", "asked", "expected"),
    [(None, None, 16), (None, 40, 40), ((1, 4, 64), None, 16), ((1, 4, 7), None, 7), ((1, 4, 7), 7, 7)],
)
def test_a_batch_fits_into_what_the_engine_was_built_for(built, asked, expected):
    assert choose_batch(Path("x.engine"), None if built is None else BatchRange(*built), asked) == expected


def test_a_batch_that_does_not_fit_is_refused_with_what_to_do():
    with pytest.raises(UsageError) as refusal:
        choose_batch(Path("x.engine"), BatchRange(1, 2, 4), 5)
    facts = ["x.engine", "at most 4 image", "--batch 4 (batch=4)", "tqdit-build --batch 1,2,5"]
    assert all(fact in str(refusal.value) for fact in facts)


def test_a_guided_image_is_two_rows_of_a_network_call(card):
    assert BatchRange(1, 2, 8).rows(card.rows_per_image) == (2, 4, 16)
    assert BatchRange(1, 2, 8).rows(replace(card, guidance=None).rows_per_image) == (1, 2, 8)
    assert BatchRange(1, 2, 8).rows(replace(card, graph="step").rows_per_image) == (
        1,
        2,
        8,
    )  # it doubles them inside


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
        ([6], r"'class_labels' 6 is out of range; this model knows 0\.\.4"),
        ([-1], "'class_labels' -1"),
        ([], "non-empty"),
        ([0.5], "integer numbers"),
        (3, "non-empty array"),
    ],
)
def test_impossible_labels_are_refused(bundle, labels, message):
    with Sampler.open(bundle) as sampler, pytest.raises(UsageError, match=message):
        sampler.sample(labels)


def test_the_null_class_samples_without_a_class(bundle):
    with Sampler.open(bundle) as sampler:
        one, two = sampler.sample_latents([5], 1.0), sampler.sample_latents([5], 7.0)
    np.testing.assert_allclose(one, two, atol=1e-3)  # guidance has nothing to move; cancellation leaves rounding


def test_nan_is_reported_with_image_class_and_step(card):
    def breaks(inputs):
        output = np.concatenate([inputs["x"], inputs["x"]], axis=1)
        if inputs["timestep"][0] == card.sampling.schedule.timesteps[12]:
            output[1, 0, 0, 0] = np.nan
        return output

    with pytest.raises(SamplingError, match=r"image 1 \(class_labels 4\) became NaN or infinite at step 12"):
        Sampler(card, breaks).sample([0, 4, 2])


def test_a_guidance_scale_that_is_no_number_or_has_no_input_is_refused(bundle, bundle_of):
    with Sampler.open(bundle) as sampler, pytest.raises(UsageError, match="nan; expected a finite number"):
        sampler.sample([0], float("nan"))
    with Sampler.open(bundle_of(guided=False)) as sampler, pytest.raises(UsageError, match="without guidance"):
        sampler.sample([0], 2.0)


@pytest.mark.slow
def test_latents_without_a_decoder_are_no_images(bundle_of):
    with Sampler.open(bundle_of(pixels=False)) as sampler:
        assert not sampler.makes_images
        with pytest.raises(UsageError, match="no decoder"):
            sampler.sample([0])
        assert sampler.sample_latents([0]).shape == (1, 4, 8, 8)


@pytest.mark.slow
def test_a_step_engine_is_refused_in_one_line(bundle_of, card):
    with pytest.raises(
        UsageError, match=r"model\.engine: holds a step graph.*other languages.*--graph step"
    ) as refusal:
        Sampler.open(bundle_of(pixels=False, graph="step"))
    assert "\n" not in str(refusal.value)
    with pytest.raises(UsageError, match="holds a step graph"):
        Sampler(replace(card, graph="step"), lambda inputs: inputs["x"])


def test_a_closed_sampler_says_so_and_can_be_opened_again(bundle):
    sampler = Sampler.open(bundle)
    expected = sampler.sample([0])
    sampler.close()
    sampler.close()
    with pytest.raises(UsageError, match="closed"):
        sampler.sample([0])
    with Sampler.open(bundle) as again:
        np.testing.assert_array_equal(again.sample([0]), expected)
