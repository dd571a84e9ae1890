"""Step-level batching: nothing is lost, doubled or stuck, and an image is the one that a Sampler makes alone."""

import asyncio
import concurrent.futures
import gc
import random
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
import pytest

from support import few
from tables import Kind
from tqdit.engines.build.engine import build_engine
from tqdit.engines.bundle import read_manifest, write_manifest
from tqdit.engines.config import BatchRange
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.step_batcher import StepBatcher
from tqdit.errors import DeadlineError, QueueFullError, SamplingError, SamplingStopped, UsageError
from tqdit.sampling.process import Diffusion

SOON = 60  # seconds that nothing here may take; a deadlock shows as a TimeoutError
NAN_LABEL = 4  # of the fake engine
STEPS = 20
CHAINS = [(STEPS, "ddpm"), (STEPS, "ddim"), (5, "ddim"), (33, "ddpm")]


class FakeEngine:
    """A network of a guided model. Its rows do not depend on each other; it can be held, and fails when told."""

    noise_level = np.sqrt(1 - Diffusion().alphas_cumprod)  # a prediction of this times x keeps the states near N(0, 1)

    def __init__(self, held=False):
        self.calls = []  # steps of each call's images
        self.fail_at = set()  # numbers of calls
        self.turns = threading.Semaphore(0) if held else None
        self.entered = threading.Semaphore(0)  # one more with each call begun
        self._output = None

    def allow(self, calls):
        """Let so many held calls through and wait until the one after them stands at the gate."""
        for _ in range(calls):
            self.turns.release()
            assert self.entered.acquire(timeout=SOON)

    def let_go(self):
        self.turns.release(10_000)

    def __call__(self, inputs):
        number = len(self.calls)
        timesteps, labels = inputs["timestep"], inputs["class_labels"]
        steps = np.round(timesteps * (STEPS - 1) / 999)
        self.calls.append(steps[: len(steps) // 2].astype(int).tolist())
        self.entered.release()
        if self.turns is not None:
            assert self.turns.acquire(timeout=SOON)
        if number in self.fail_at:
            raise OSError("device lost")
        level, bias = (
            values.reshape(-1, 1, 1, 1) for values in (self.noise_level[timesteps], np.sin(steps + 7 * labels))
        )
        predicted = level * inputs["x"] + 0.1 * bias
        predicted[(labels == NAN_LABEL) & (steps == 5)] = np.nan
        return np.concatenate([predicted, np.sin(predicted)], axis=1).astype(np.float32)

    def close(self):
        pass


@pytest.fixture(scope="module")
def card(bundle):
    """Of a pixel model: DDPM, 20 steps, 5 classes, 3x8x8."""
    return read_manifest(bundle).card


@pytest.fixture
def held(card):
    """A batcher of two rows whose engine waits for `allow`; released at the end."""
    engine = FakeEngine(held=True)
    batcher = StepBatcher(Sampler(card, engine), batch=2, queue=3)
    yield batcher, engine
    engine.let_go()
    batcher.close(drain=False)


def alone(card, label, scale=None, seed=0, image=0, **chain):
    return Sampler(card, FakeEngine()).sample([label], scale, seed, first_image=image, **chain)[0]


def submit_random(batcher, rng, count, states):
    """Requests with everything random, at random moments: [(arguments, future)]; their last states go to `states`."""
    made = []
    for index in range(count):
        arguments = (rng.randrange(5), rng.choice([1.0, 2.5]), rng.randrange(2**64), index, rng.choice(CHAINS))
        label, scale, seed, image, (steps, sampler) = arguments
        future = batcher.submit(
            label, guidance_scale=scale, seed=seed, image_index=image, steps=steps, sampler=sampler,
            preview_every=steps, on_progress=lambda progress, index=index: states.update({index: progress.x}),
        )  # fmt: skip
        made.append((arguments, future))
        time.sleep(rng.choice([0, 0, 0.002]))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, Kind(asymmetric=True, groups=10, everywhere=True)], ids=["float", "int8"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_image_is_that_of_sampling_alone_bit_for_bit(bundle_of, tmp_path, kind, backend):
    """Its float32 state too, of which the image shows 8 bits."""
    states, folder = {}, bundle_of(kind=kind)
    if backend == "openvino":
        build_engine(folder.with_name("model.onnx"), tmp_path / "model.engine", "openvino")
        folder = tmp_path / "model.engine"
    with Sampler.open(folder) as sampler, StepBatcher(sampler, batch=5) as batcher:
        made = submit_random(batcher, random.Random(0), 24, states)
        images = [future.result(SOON) for _, future in made]
        stats = batcher.stats()
        assert stats.steps == sum(steps for (*_, (steps, _)), _ in made)
        assert stats.steps > 2 * stats.engine_calls  # images did share calls
        for index, ((label, scale, seed, image, (steps, name)), _) in enumerate(made):
            expected = sampler.sample_latents([label], scale, seed, first_image=image, steps=steps, sampler=name)
            np.testing.assert_array_equal(states[index], expected[0])
            np.testing.assert_array_equal(images[index], sampler.to_images(expected)[0])
            assert images[index].dtype == np.uint8


def test_latents_without_a_decoder_are_the_result(bundle_of):
    folder = bundle_of(pixels=False)
    with StepBatcher(folder, batch=2) as batcher, Sampler.open(folder) as sampler:
        futures = [batcher.submit(label, seed=3) for label in (0, 1, 2)]
        for label, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(SOON), sampler.sample_latents([label], seed=3)[0])


@pytest.mark.slow
def test_an_unguided_engine_takes_requests_without_a_scale(bundle_of):
    with StepBatcher(bundle_of(guided=False)) as batcher:
        assert batcher.submit(1).result(SOON).shape == (8, 8, 3)
        with pytest.raises(UsageError, match="without guidance"):
            batcher.submit(1, guidance_scale=2.0)


def test_a_request_joins_at_the_next_step_and_requests_at_different_steps_share_calls(held):
    batcher, engine = held
    first = batcher.submit(0)
    assert engine.entered.acquire(timeout=SOON)
    engine.allow(2)
    second, third = batcher.submit(1), batcher.submit(2)
    engine.allow(STEPS)
    assert engine.calls[:5] == [[19], [18], [17], [16, 19], [15, 18]]
    assert first.done()
    assert not second.done()
    assert engine.calls[20] == [2, 19]  # the third took the place that the first left
    engine.allow(2)
    assert second.done()
    assert not third.done()


def test_requests_of_different_chains_share_every_call(card):
    """20 steps of DDIM beside the card's 20 of DDPM and 250 more: 250 calls, and the images of each alone."""
    chains = [{}, {"steps": 250}, {"steps": 20, "sampler": "ddim"}]
    engine, seen = FakeEngine(held=True), []
    with StepBatcher(Sampler(card, engine)) as batcher:
        first = batcher.submit(1, on_progress=lambda progress: seen.append(progress.steps))
        assert engine.entered.acquire(timeout=SOON)
        others = [batcher.submit(1, on_progress=lambda p: seen.append(p.steps), **chain) for chain in chains[1:]]
        engine.let_go()
        for future, chain in zip([first, *others], chains, strict=True):
            np.testing.assert_array_equal(future.result(SOON), alone(card, 1, **chain))
        assert batcher.stats().engine_calls == 251  # the second came one call after the first
    assert Counter(seen) == {20: 40, 250: 250}


def test_requests_are_served_in_the_order_of_arrival(card):
    engine, order = FakeEngine(), []
    with StepBatcher(Sampler(card, engine), batch=1) as batcher:
        futures = [batcher.submit(0, seed=seed) for seed in range(6)]
        for number, future in enumerate(futures):
            future.add_done_callback(lambda _, number=number: order.append(number))
    assert sorted(order) == order == list(range(6))
    assert engine.calls == 6 * [[step] for step in reversed(range(STEPS))]


def test_a_callback_sees_every_step_and_a_copy_of_every_nth_state(card):
    seen = []
    with StepBatcher(Sampler(card, FakeEngine())) as batcher:
        image = batcher.submit(1, seed=2, on_progress=seen.append, preview_every=5).result(SOON)
        assert [report.step for report in seen] == list(reversed(range(STEPS)))
        assert {report.steps for report in seen} == {STEPS}
        assert [report.step for report in seen if report.x is not None] == [15, 10, 5, 0]
        states = [report.x for report in seen if report.x is not None]
        assert all(not np.array_equal(states[0], state) for state in states[1:])
        np.testing.assert_array_equal(batcher.sampler.to_images(states[-1][None])[0], image)


def test_a_waiting_request_is_cancelled_at_once_and_its_place_is_free(held):
    batcher, engine = held
    running = [batcher.submit(0), batcher.submit(1)]
    assert engine.entered.acquire(timeout=SOON)
    waiting = [batcher.submit(2) for _ in range(3)]
    with pytest.raises(QueueFullError, match="5 requests are unfinished, the batcher takes 2 running and 3 waiting"):
        batcher.submit(3)
    assert waiting[1].cancel()
    assert waiting[1].cancel()  # again, as for any future
    assert not concurrent.futures.wait([waiting[1]], timeout=SOON).not_done
    late = batcher.submit(3)
    engine.let_go()
    assert not concurrent.futures.wait([*running, waiting[0], waiting[2], late], timeout=SOON).not_done
    assert sum(map(len, engine.calls)) == 5 * STEPS


def test_a_running_request_that_is_cancelled_frees_its_place_at_the_next_step(held):
    batcher, engine = held
    first, second, third = batcher.submit(0), batcher.submit(1), batcher.submit(2)
    assert engine.entered.acquire(timeout=SOON)
    engine.allow(4)
    assert first.cancel()
    with pytest.raises(CancelledError):
        first.result(0)
    engine.allow(1)
    before, after = engine.calls[-2:]
    assert before.count(19) == 0
    assert sorted(after) == [before[1] - 1, 19]  # the second goes on, the third has begun
    engine.let_go()
    np.testing.assert_array_equal(second.result(SOON), alone(batcher.card, 1))
    np.testing.assert_array_equal(third.result(SOON), alone(batcher.card, 2))


def test_a_request_that_is_cancelled_between_two_steps_takes_no_part_in_the_next(held):
    batcher, engine = held
    first = batcher.submit(0)
    batcher.submit(1, on_progress=lambda _: first.cancel() and None)  # comes after the first in every step
    assert engine.entered.acquire(timeout=SOON)
    engine.allow(2)
    assert first.cancelled()
    both = next(steps for steps in engine.calls if len(steps) == 2)
    assert len(engine.calls[engine.calls.index(both) + 1]) == 1


def test_a_deadline_ends_a_running_request_and_drops_a_waiting_request(held):
    batcher, engine = held
    running = batcher.submit(0, deadline=0.05)
    other = batcher.submit(1)
    assert engine.entered.acquire(timeout=SOON)
    waiting = batcher.submit(2, deadline=0.05)
    patient = batcher.submit(3, deadline=SOON)
    time.sleep(0.1)
    engine.allow(1)
    with pytest.raises(DeadlineError, match=r"the deadline passed after [01] of 20 steps"):
        running.result(SOON)
    with pytest.raises(TimeoutError, match="before it began"):
        waiting.result(SOON)
    engine.let_go()
    np.testing.assert_array_equal(other.result(SOON), alone(batcher.card, 1))
    np.testing.assert_array_equal(patient.result(SOON), alone(batcher.card, 3))


def test_a_failing_callback_fails_its_own_request_alone(card):
    def broken(progress):
        if progress.step == 11:
            raise ZeroDivisionError("mine")

    def leaves(progress):
        raise SystemExit  # would end the thread, were it not caught

    with StepBatcher(Sampler(card, FakeEngine())) as batcher:
        bad = [batcher.submit(0, on_progress=broken), batcher.submit(0, on_progress=leaves)]
        stopped = batcher.submit(1, on_progress=lambda progress: progress.step == 7)
        good = batcher.submit(2)
        with pytest.raises(ZeroDivisionError, match="mine"):
            bad[0].result(SOON)
        with pytest.raises(SystemExit):
            bad[1].result(SOON)
        with pytest.raises(SamplingStopped, match="step 7 of image 0"):
            stopped.result(SOON)
        np.testing.assert_array_equal(good.result(SOON), alone(card, 2))


def test_an_image_that_becomes_nan_fails_alone(card):
    with StepBatcher(Sampler(card, FakeEngine())) as batcher:
        good, bad = batcher.submit(0), batcher.submit(NAN_LABEL, image_index=9)
        with pytest.raises(SamplingError, match=r"image 9 \(class_labels 4\) became NaN or infinite at step 5"):
            bad.result(SOON)
        np.testing.assert_array_equal(good.result(SOON), alone(card, 0))


def test_an_engine_that_fails_fails_the_requests_of_that_call_and_no_more(held):
    batcher, engine = held
    engine.fail_at = {2}
    rows = [batcher.submit(0), batcher.submit(1)]
    waiting = batcher.submit(2)
    assert engine.entered.acquire(timeout=SOON)
    engine.allow(3)
    engine.let_go()
    assert {len(steps) for steps in engine.calls[1:3]} == {2}
    for future in rows:
        with pytest.raises(SamplingError, match=r"failed in a call of 2 image\(s\) \(OSError: device lost\)") as e:
            future.result(0)
        assert isinstance(e.value.__cause__, OSError)
    np.testing.assert_array_equal(waiting.result(SOON), alone(batcher.card, 2))


def test_an_output_of_another_shape_is_a_failure_of_the_engine(card):
    class Wrong(FakeEngine):
        def __call__(self, inputs):
            return super().__call__(inputs)[:1, :1]

    message = r"returned shape \(1, 1, 8, 8\) for \(2, 6, 8, 8\)"
    with StepBatcher(Sampler(card, Wrong())) as batcher, pytest.raises(SamplingError, match=message):
        batcher.submit(0).result(SOON)


def test_a_decoder_that_fails_fails_one_request(bundle_of):
    card = read_manifest(bundle_of(pixels=False)).card

    failures = iter([True])

    def decode(inputs):
        if next(failures, False):
            raise MemoryError("no room")
        return np.zeros((1, 3, 16, 16), np.float32)

    with StepBatcher(Sampler(card, FakeEngine(), decode), batch=1) as batcher:
        futures = [batcher.submit(label) for label in (0, 1)]
        with pytest.raises(MemoryError, match="no room"):
            futures[0].result(SOON)
        assert futures[1].result(SOON).shape == (16, 16, 3)


def test_an_engine_may_reuse_its_output_buffer(card):
    class Reuses(FakeEngine):
        buffer = np.empty((8, 6, 8, 8), np.float32)

        def __call__(self, inputs):
            out = self.buffer[: len(inputs["x"])]
            assert not np.shares_memory(out, inputs["x"])
            out[:] = super().__call__(inputs)
            return out

    engine = Reuses()
    np.testing.assert_array_equal(Sampler(card, engine).sample([1, 2], seed=1)[0], alone(card, 1, seed=1))
    with StepBatcher(Sampler(card, engine), batch=4) as batcher:
        futures = [batcher.submit(label) for label in (0, 1, 2, 3)]
        for label, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(SOON), alone(card, label))


def test_closing_finishes_what_was_accepted(card):
    batcher = StepBatcher(Sampler(card, FakeEngine()), batch=3)
    futures = [batcher.submit(0, seed=seed) for seed in range(10)]
    batcher.close()
    batcher.close()
    for seed, future in enumerate(futures):
        np.testing.assert_array_equal(future.result(0), alone(card, 0, seed=seed))
    with pytest.raises(UsageError, match="this batcher is closed"):
        batcher.submit(0)


def test_closing_without_drain_while_busy_fails_all_that_is_open(held):
    batcher, engine = held
    futures = [batcher.submit(0, seed=seed) for seed in range(5)]
    assert engine.entered.acquire(timeout=SOON)
    draining = threading.Thread(target=batcher.close)
    stopping = threading.Thread(target=batcher.close, args=(False,))
    draining.start()
    stopping.start()
    time.sleep(0.05)
    assert draining.is_alive()  # the engine call in progress is not interrupted
    engine.turns.release()
    for thread in (draining, stopping):
        thread.join(SOON)
        assert not thread.is_alive()
    for future in futures:
        with pytest.raises(SamplingStopped, match="the batcher was closed"):
            future.result(0)
    assert len(engine.calls) <= 2
    stats = batcher.stats()
    assert stats.waiting == stats.running == 0


@pytest.mark.slow
def test_an_exception_in_the_with_block_does_not_wait_for_the_queue(card):
    engine, futures = FakeEngine(), []

    def serve():
        with StepBatcher(Sampler(card, engine), batch=1, queue=999) as batcher:
            futures.extend(batcher.submit(0) for _ in range(1000))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve()
    assert all(future.done() for future in futures)
    assert len(engine.calls) < 1000 * STEPS


def test_a_callback_may_close_submit_and_cancel(card):
    futures, accepted = {}, threading.Event()

    def meddle(progress):
        assert accepted.wait(SOON)
        if progress.step == 10:
            futures["second"] = batcher.submit(1)
            futures["third"] = batcher.submit(2)
            futures["third"].cancel()
            batcher.close()

    batcher = StepBatcher(Sampler(card, FakeEngine()))
    futures["first"] = batcher.submit(0, on_progress=meddle)
    accepted.set()
    np.testing.assert_array_equal(futures["first"].result(SOON), alone(card, 0))
    np.testing.assert_array_equal(futures["second"].result(SOON), alone(card, 1))
    assert futures["third"].cancelled()
    batcher.close()


def test_a_finished_request_has_made_room_when_its_owner_hears_of_it(card):
    with StepBatcher(Sampler(card, FakeEngine()), batch=1, queue=0) as batcher:
        for seed in range(30):
            image = batcher.submit(0, seed=seed).result(SOON)  # would raise QueueFullError
            np.testing.assert_array_equal(image, alone(card, 0, seed=seed))


def test_futures_are_awaited_and_cancelled_by_asyncio(card):
    engine = FakeEngine(held=True)

    async def main():
        first, second = asyncio.wrap_future(batcher.submit(0)), asyncio.wrap_future(batcher.submit(1))
        second.cancel()
        for _ in range(3 * STEPS):
            engine.turns.release()
        with pytest.raises(asyncio.CancelledError):
            await second
        return await asyncio.wait_for(first, SOON)

    with StepBatcher(Sampler(card, engine)) as batcher:
        np.testing.assert_array_equal(asyncio.run(main()), alone(card, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"request": 6}, "'class_labels' 6 is out of range"),
        ({"request": 0.5}, "integer numbers"),
        ({"request": 0, "guidance_scale": float("inf")}, "inf; expected a finite number"),
        ({"request": 0, "seed": -1}, "seed is -1"),
        ({"request": 0, "image_index": 2**64}, "image is 18446744073709551616"),
        ({"request": 0, "deadline": 0}, "deadline is 0"),
        ({"request": 0, "deadline": float("nan")}, "deadline is nan"),
        ({"request": 0, "preview_every": 3}, "an on_progress to call"),
    ],
)
def test_impossible_requests_are_refused_at_once(card, arguments, message):
    with StepBatcher(Sampler(card, FakeEngine())) as batcher:
        with pytest.raises(UsageError, match=message):
            batcher.submit(**arguments)
        assert batcher.submit(0).result(SOON) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch": 0}, "batch is 0"), ({"queue": -1}, "queue -1"), ({"batch": 17}, "opened for 16"),
     ({"threads": 1}, "open already")],
)  # fmt: skip
def test_impossible_batchers_are_refused(card, options, message):
    with pytest.raises(UsageError, match=message):
        StepBatcher(Sampler(card, FakeEngine()), **options)


def test_a_path_whose_engine_was_built_for_few_images_is_batched_accordingly(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "few.engine")
    manifest = read_manifest(bundle)
    write_manifest(tmp_path / "few.engine", replace(manifest, batch=BatchRange(1, 2, 3)))
    with StepBatcher(tmp_path / "few.engine") as batcher:
        assert batcher.batch == 3
    with pytest.raises(UsageError, match="built for at most 3"):
        StepBatcher(tmp_path / "few.engine", batch=4)


def test_a_path_is_opened_and_closed_with_the_batcher(bundle):
    batcher = StepBatcher(bundle, batch=3, threads=1)
    assert batcher.sampler.batch == 3
    expected = batcher.submit(0).result(SOON)
    batcher.close()
    with pytest.raises(UsageError, match="closed"):
        batcher.sampler.sample([0])
    with Sampler.open(bundle) as sampler:
        with StepBatcher(sampler) as again:
            np.testing.assert_array_equal(again.submit(0).result(SOON), expected)
        np.testing.assert_array_equal(sampler.sample([0])[0], expected)  # still the caller's


def large(card):
    """The card of the same model at 512x512."""
    shape, signature = (None, 3, 512, 512), card.signature
    ports = tuple(replace(port, shape=shape) if port.kind == "state" else port for port in signature.ports)
    return replace(card, signature=replace(signature, ports=ports, output=(None, 6, 512, 512)))


def test_waiting_requests_hold_no_state(card):
    """512x512 images: one state is 3 MB; 257 waiting requests must cost next to nothing."""
    engine = FakeEngine(held=True)
    batcher = StepBatcher(Sampler(large(card), engine), batch=2)
    batcher.submit(0)
    assert engine.entered.acquire(timeout=SOON)
    tracemalloc.start()
    futures = [batcher.submit(0, seed=seed) for seed in range(257)]
    assert tracemalloc.get_traced_memory()[0] < 1_000_000
    tracemalloc.stop()
    for future in futures:
        future.cancel()
    for _ in range(STEPS):
        engine.turns.release()
    batcher.close(drain=False)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_requests(card):
    with StepBatcher(Sampler(card, FakeEngine()), batch=4) as batcher:

        def run(count):
            for start in range(0, count, 50):
                for future in [batcher.submit(0, seed=seed) for seed in range(start, start + 50)]:
                    future.result(SOON)

        batcher.sampler._network.calls = Ignored()
        run(100)
        tracemalloc.start()
        run(100)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        run(400)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    assert grown < 100_000  # one result and its future are 1 kB: 400 kept ones would show


class Ignored(list):
    def append(self, value):
        pass


@pytest.mark.slow
def test_a_forgotten_batcher_does_not_keep_the_interpreter_from_ending(bundle):
    program = (
        "import sys\nfrom tqdit.engines.run.step_batcher import StepBatcher\n"
        "batcher = StepBatcher(sys.argv[1], queue=5000)\n"
        "futures = [batcher.submit(0, seed=seed) for seed in range(5000)]\n"
        "futures[0].result()\nprint('end')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, bundle], capture_output=True, text=True, timeout=SOON, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("seed", few(range(4), 0))
def test_hundreds_of_random_arrivals_cancels_and_failures(card, seed):
    """Eight threads submit 400 requests in all; every one ends exactly once, in a way that it asked for."""
    engine = FakeEngine()
    engine.fail_at = set(random.Random(seed).sample(range(300), 4))
    outcomes, resolved, guard = [], Counter(), threading.Lock()

    def note(key):
        with guard:
            resolved[key] += 1

    def client(number):
        rng = random.Random(100 * seed + number)
        for index in range(50):
            label, image = rng.randrange(5), 1000 * number + index
            wish = rng.choice(["none"] * 4 + ["cancel", "cancel late", "deadline", "callback", "stop"])
            callback, deadline, stop_at = None, None, rng.randrange(STEPS)
            if wish == "callback":
                callback = lambda progress, at=stop_at: 1 / (progress.step - at) and None  # noqa: E731
            if wish == "stop":
                callback = lambda progress, at=stop_at: progress.step == at  # noqa: E731
            if wish == "deadline":
                deadline = rng.choice([1e-6, 0.005, 0.05])
            while True:
                try:
                    future = batcher.submit(
                        label, seed=number, image_index=image, deadline=deadline, on_progress=callback
                    )
                    break
                except QueueFullError:
                    time.sleep(0.001)
            future.add_done_callback(lambda _, key=(number, index): note(key))
            if wish == "cancel late":
                time.sleep(rng.random() * 0.01)
            if wish.startswith("cancel"):
                future.cancel()
            with guard:
                outcomes.append((wish, label, number, image, future))
            time.sleep(rng.choice([0, 0, 0.001]))

    with StepBatcher(Sampler(card, engine), batch=6, queue=10) as batcher:
        clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(SOON)
            assert not thread.is_alive()
        kinds = Counter()
        for wish, label, number, image, future in outcomes:
            kind = ending(future, wish, label)
            kinds[kind] += 1
            if kind == "image":
                np.testing.assert_array_equal(future.result(0), alone(card, label, seed=number, image=image))
        stats = batcher.stats()
    assert len(outcomes) == 400
    assert sum(kinds.values()) == 400
    assert set(resolved.values()) == {1}
    assert len(resolved) == 400
    assert (stats.waiting, stats.running) == (0, 0)
    assert max(map(len, engine.calls)) == 6
    assert kinds["image"] > 80
    assert {"cancelled", "late", "callback", "stopped", "nan", "engine"} <= set(kinds)


def ending(future, wish, label):
    """How a request ended; fails where that is not what was asked for."""
    try:
        future.result(SOON)
    except CancelledError:
        assert wish.startswith("cancel")
        return "cancelled"
    except DeadlineError:
        assert wish == "deadline"
        return "late"
    except ZeroDivisionError:
        assert wish == "callback"
        return "callback"
    except SamplingStopped:
        assert wish == "stop"
        return "stopped"
    except SamplingError as error:
        kind = "nan" if "NaN" in str(error) else "engine" if "device lost" in str(error) else "?"
        assert kind != "?"
        assert kind != "nan" or label == NAN_LABEL
        return kind
    assert wish not in ("callback", "stop")
    assert label != NAN_LABEL
    return "image"


@pytest.mark.slow
def test_random_arrivals_and_cancels_on_a_real_engine(bundle_of):
    """The same with ONNX Runtime and int8: 120 requests, a third of them cancelled, from four threads."""
    with Sampler.open(bundle_of(kind=Kind(groups=10)), threads=1) as sampler, StepBatcher(sampler, batch=4) as batcher:
        kept = []

        def client(number):
            rng = random.Random(number)
            for index in range(30):
                future = batcher.submit(index % 5, seed=number, image_index=index)
                if rng.random() < 1 / 3:
                    time.sleep(rng.random() * 0.02)
                    future.cancel()
                kept.append((index, number, future))

        clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(SOON)
        done = 0
        for number in range(4):
            expected = sampler.sample([index % 5 for index in range(30)], seed=number)
            for index, owner, future in kept:
                if owner == number and not future.cancelled():
                    np.testing.assert_array_equal(future.result(SOON), expected[index])
                    done += 1
        assert len(kept) == 120
        assert 60 <= done < 120
