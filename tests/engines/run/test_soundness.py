"""Long runs and many threads: nothing leaks, nothing mixes."""

import gc
import threading
from itertools import pairwise

import numpy as np
import psutil
import pytest

from support import few
from tables import Kind
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.step_batcher import StepBatcher

STEPS = 20  # of the tiny chains
CHAINS = 50  # 1,000 steps
LEAK_BYTES = 4 << 20  # allocators move a little; 8 states of 768 B kept in each step would be 6 MB


def resident_growth(work):
    """Growth of the process's resident memory over 1,000 steps, after as many to warm up: the least of two times.

    A leak grows each time. What other tests of the process left to the allocator and the collector moves it once.
    """
    process = psutil.Process()

    def resident():
        for _ in range(CHAINS):
            work()
        gc.collect()
        return process.memory_info().rss

    marks = [resident() for _ in range(3)]
    return min(after - before for before, after in pairwise(marks))


def in_threads(count, work):
    """Run work(number) in so many threads at once and return the results in order."""
    results, ready = [None] * count, threading.Barrier(count)

    def run(number):
        ready.wait(60)
        results[number] = work(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("kind", few([None, Kind(groups=10)], None), ids=["float", "int8"])
def test_a_sampling_loop_of_a_thousand_steps_leaks_nothing(bundle_of, kind):
    with Sampler.open(bundle_of(kind=kind), batch=8, threads=1) as sampler:
        labels = [number % 5 for number in range(8)]
        assert sampler.card.sampling.steps == STEPS
        assert resident_growth(lambda: sampler.sample(labels)) < LEAK_BYTES


@pytest.mark.full
def test_the_leak_test_would_see_states_that_are_kept(bundle):
    with Sampler.open(bundle, batch=8, threads=1) as sampler:
        kept, engine = [], sampler.predict
        leaking = Sampler(sampler.card, lambda inputs: kept.append(engine(inputs)) or kept[-1], batch=8)
        assert resident_growth(lambda: leaking.sample([0] * 8)) > LEAK_BYTES


@pytest.mark.slow
def test_step_batching_for_a_thousand_steps_leaks_nothing(bundle):
    with StepBatcher(bundle, batch=8, threads=1) as batcher:

        def work():
            for future in [batcher.submit(number % 5, seed=number) for number in range(8)]:
                future.result(60)

        assert resident_growth(work) < LEAK_BYTES


@pytest.mark.slow
def test_opening_and_closing_engines_leaks_nothing(bundle):
    def work():
        with Sampler.open(bundle, threads=1) as sampler:
            sampler.predict(sampler.card.signature.zeros(1))

    assert resident_growth(work) < LEAK_BYTES


@pytest.mark.slow
def test_two_samplers_in_one_process_keep_apart(bundle_of):
    """A float and an int8 engine, each from two threads, at once."""
    folders = [bundle_of(), bundle_of(kind=Kind(groups=10))]
    labels = [0, 1, 2, 3]
    expected = []
    for folder in folders:
        with Sampler.open(folder) as lone:
            expected.append(lone.sample(labels, seed=6))
    assert not np.array_equal(*expected)
    with Sampler.open(folders[0]) as one, Sampler.open(folders[1]) as two:
        results = in_threads(4, lambda number: [(one, two)[number % 2].sample(labels, seed=6) for _ in range(5)])
    for number, images in enumerate(results):
        for image in images:
            np.testing.assert_array_equal(image, expected[number % 2])


@pytest.mark.slow
def test_one_sampler_from_eight_threads_gives_the_right_images(bundle_of):
    """Batches of different sizes, classes, seeds and scales at once, against the same one after another."""

    def work(number):
        labels = [(number + row) % 5 for row in range(1 + number % 4)]
        return [sampler.sample_latents(labels, 1.0 + number, seed=seed, first_image=number) for seed in range(4)]

    with Sampler.open(bundle_of(kind=Kind(groups=10)), batch=3) as sampler:
        expected = [work(number) for number in range(8)]
        for made, right in zip(in_threads(8, work), expected, strict=True):
            for x, y in zip(made, right, strict=True):
                np.testing.assert_array_equal(x, y)


def test_a_sampler_and_a_batcher_share_one_engine(bundle):
    """A StepBatcher works while eight threads sample with the sampler that it was given."""
    with Sampler.open(bundle) as sampler, StepBatcher(sampler, batch=4) as batcher:
        right = sampler.sample([0, 1, 2, 3, 4], seed=2)
        futures = [batcher.submit(number % 5, seed=2, image_index=number % 5) for number in range(10)]
        for images in in_threads(8, lambda _: sampler.sample([0, 1, 2, 3, 4], seed=2)):
            np.testing.assert_array_equal(images, right)
        for number, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(60), right[number % 5])
