"""Forecasts against a loop that is written out, and chains of all kinds in one object."""

from dataclasses import replace

import numpy as np
import pytest

from sampling.toy import GUIDANCE, SIGNATURE, Toy, start
from tqdit.errors import UsageError
from tqdit.sampling.chains import Chains, run
from tqdit.sampling.forecasts import spread
from tqdit.sampling.process import Diffusion
from tqdit.sampling.schedule import SamplingSpec

SPEC = SamplingSpec(Diffusion(), "dpm++2m", 20)


def written_out(spec, number, scale=2.0):
    """One chain with residuals extrapolated in float64; full calls alone fix the line."""
    toy, known = Toy(), {4: [], number % 4: []}
    plain = replace(spec, full_calls=())
    batch = Chains(SIGNATURE, GUIDANCE, 1)
    batch.add(plain.schedule, {"label": number % 4}, scale, 5, number)
    while (step := batch.step_of(0)) >= 0:
        inputs = batch.inputs()
        time, rows = float(inputs["t"][0]), []
        for row, label in enumerate(inputs["label"].tolist()):
            one = {name: array[row : row + 1] for name, array in inputs.items()}
            if step in spec.full_calls or not spec.full_calls:
                d = toy.blocks(one)
                known[label].append((time, d.astype(np.float64)))
            else:
                (t0, d0), (t1, d1) = known[label][-2:]
                d = (d1 + (time - t1) / (t1 - t0) * (d1 - d0)).astype(np.float32)
            rows.append(toy.final(one, d))
        batch.advance(np.concatenate(rows))
    return batch.x[0].copy()


@pytest.mark.parametrize("calls", [3, 8, 11, 19, 20])
@pytest.mark.parametrize("sampler", ["dpm++2m", "ddpm", "ddim"])
def test_a_chain_with_forecasts_follows_its_formula(calls, sampler):
    """float32 against float64: 1e-5 of states of 1 to 30."""
    spec, toy = SPEC.choose(sampler=sampler, full_calls=calls), Toy()
    done = run(start([spec, spec, spec]), toy)
    for number in range(3):
        np.testing.assert_allclose(done[number], written_out(spec, number), rtol=1e-5, atol=1e-5)
    if calls < 20:
        assert toy.rows == {"plain": [], "full": calls * [6], "forecast": (20 - calls) * [6]}
    else:
        assert toy.rows == {"plain": 20 * [6], "full": [], "forecast": []}


def test_forecasts_of_a_residual_that_is_linear_in_time_change_nothing():
    class Linear(Toy):
        def blocks(self, inputs):
            return np.broadcast_to(inputs["t"].reshape(-1, 1, 1, 1) / 500, inputs["x"].shape).astype(np.float32)

    whole = run(start([SPEC]), Linear()).copy()
    forecast = run(start([SPEC.choose(full_calls=6)]), Linear())
    np.testing.assert_allclose(forecast, whole, rtol=0, atol=1e-5)


def rounds(batch, toy, running):
    """What a batcher does: forecasts first, for those that can; then a full call for all."""
    ahead = [place for place in range(batch.count) if not batch.is_full(place)]
    count = len(ahead) or batch.count
    for place, chain in enumerate(ahead):
        batch.swap(place, chain)
        running[place], running[chain] = running[chain], running[place]
    with batch.first(count):
        assert batch.step(toy).all()


@pytest.mark.parametrize("sampler", ["dpm++2m", "ddpm"])
def test_a_chain_ends_alike_whatever_runs_beside_it_bit_for_bit(sampler):
    """Chains that forecast run ahead of others to their next full call, which all share; chains come and go. One has no
    unconditional row in some of its steps."""
    specs = [SPEC.choose(steps, sampler, full_calls=calls) for steps, calls in ((20, 5), (20, 20), (9, 4), (31, 16))]
    specs.append(SPEC.choose(20, sampler, guidance_interval=(200, 700)))
    alone = {}
    for number, spec in enumerate(specs):
        lone = Chains(SIGNATURE, GUIDANCE, 1)
        lone.add(spec.schedule, {"label": number % 4}, 2.0, 5, number)
        alone[number] = run(lone, Toy())[0].copy()
    rng, toy, batch = np.random.default_rng(0), Toy(), Chains(SIGNATURE, GUIDANCE, 4)
    running, waiting, done = [], 8 * [*range(len(specs))], 0
    rng.shuffle(waiting)
    while waiting or running:
        while waiting and len(running) < 4 and rng.random() < 0.6:
            number = waiting.pop()
            batch.add(specs[number].schedule, {"label": number % 4}, 2.0, 5, number)
            running.append(number)
        if not running:
            continue
        rounds(batch, toy, running)
        for place in reversed(range(len(running))):
            if batch.step_of(place) < 0:
                np.testing.assert_array_equal(batch.x[place], alone[running[place]])
                done += 1
                batch.remove(place)
                running[place] = running[-1]
                running.pop()
    assert done == 40
    assert max(toy.rows["full"]) == 8  # four images with two rows each


@pytest.mark.parametrize(("steps", "calls"), [(3, 3), (10, 3), (10, 4), (250, 125), (50, 26), (12, 11)])
def test_full_calls_are_spread_over_the_chain(steps, calls):
    found = np.array(spread(steps, calls))
    assert len(found) == calls
    assert {0, steps - 2, steps - 1} <= {*found.tolist()}
    gaps = np.diff(found[:-1])
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


def test_a_chain_says_how_many_calls_are_full():
    assert str(SPEC.choose(full_calls=8)) == "20 steps of dpm++2m, 8 of them with full calls"
    assert SPEC.choose(full_calls=8).calls == SPEC.choose(full_calls=8).cost == 8
    assert SPEC.choose(full_calls=20) == SPEC


def test_full_calls_stay_with_their_chain_alone():
    spec = SPEC.choose(full_calls=8)
    assert spec.choose(20, "dpm++2m") == spec
    assert spec.choose(19).full_calls == ()
    assert spec.choose(full_calls=()).full_calls == ()
    assert spec.choose(full_calls=(0, 9, 18, 19)).full_calls == (0, 9, 18, 19)


def test_as_many_full_calls_of_the_chain_as_it_has_are_its_own():
    """So that a chain is told by its numbers, as a server's answer does."""
    spec = SPEC.choose(full_calls=(0, 1, 2, 18, 19))
    assert spec.full_calls != spread(20, 5)
    assert spec.choose(20, "dpm++2m", full_calls=5) == spec
    assert spec.choose(full_calls=6).full_calls == spread(20, 6)
    assert spec.choose(sampler="unipc", full_calls=5).full_calls == spread(20, 5)
    assert spec.choose(full_calls=20) == SPEC


@pytest.mark.parametrize("calls", [8, 19])
def test_a_sampler_that_visits_a_timestep_twice_has_no_forecasts(calls):
    with pytest.raises(UsageError, match=r"^full calls of heun, which visits a timestep twice"):
        SPEC.choose(sampler="heun", full_calls=calls)


@pytest.mark.parametrize(
    ("full_calls", "facts"),
    [(2, "2 full calls of 20 steps"), (21, "21 full calls of 20 steps"), ((0, 5, 19), "0, 5, 19.*18 and 19"),
     ((5, 3, 18, 19), "ascending"), ((-1, 18, 19), "-1"), ("ab", "full calls ab.*steps")],
)  # fmt: skip
def test_full_calls_that_a_chain_cannot_have_are_refused(full_calls, facts):
    with pytest.raises(UsageError, match=facts):
        SPEC.choose(full_calls=full_calls)


def test_forecasts_do_not_go_with_a_guidance_interval():
    with pytest.raises(UsageError, match="guidance interval"):
        SPEC.choose(full_calls=8, guidance_interval=(100, 400))
    assert SPEC.choose(full_calls=8).choose(guidance_interval=(100, 400)).full_calls == ()  # of the model's own chain
