"""Forecasts in the loops of others: calls are placed by what the scheduler and the network's timestep tell."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from tqdit.errors import UsageError
from tqdit.sampling.followed import Followed
from tqdit.sampling.forecasts import RESIDUAL, spread

TIMES = np.array([900, 800, 650, 500, 420, 300, 200, 100, 50, 10])
IDENTITY = ((1.0, 0.0),)
USUAL = ((1.0, 0.0), (1e-3, 0.0), (-1e-3, 1.0))  # t, its part of 1000, and what is left of 1000


class Network:
    """Its residual is that of its input and of the time in a curve; its prediction is twice the residual."""

    def __init__(self):
        self.calls = []

    def full(self, inputs):
        self.calls.append("full")
        residual = inputs["x"] * np.float32(1 + (inputs["t"][0] / 100) ** 2)
        return 2 * residual, residual

    def forecast(self, inputs):
        self.calls.append("forecast")
        return 2 * inputs[RESIDUAL]


def call(followed, network, time, x=(1.0, -3.0), told=lambda t: t, precision=0.0):
    x = np.array(x, np.float32)[:, None]
    return followed(network, {"x": x, "t": np.full(len(x), time, np.float64)}, told(time), precision)[:, 0]


def expected(times, full, x=(1.0, -3.0)):
    """The predictions of a chain, in ten lines. full: steps, the last one being 0."""
    made, known = [], []
    for index, time in enumerate(times):
        if len(times) - 1 - index in full:
            residual = np.array(x) * (1 + (time / 100) ** 2)
            known.append((time, residual))
        else:
            (t0, d0), (t1, d1) = known[-2:]
            residual = d1 + (time - t1) / (t1 - t0) * (d1 - d0)
        made.append(2 * residual)
    return np.array(made)


def scheduler(times=TIMES):
    return SimpleNamespace(timesteps=np.array(times), config=None)


@pytest.mark.parametrize("full", [5, (0, 3, 8, 9), 10, 3])
def test_a_chain_is_full_where_it_was_asked_for_and_linear_elsewhere(full):
    """Tolerance: float32."""
    followed, network = Followed(scheduler(), full, IDENTITY), Network()
    steps = spread(10, full) if isinstance(full, int) else full
    found = [call(followed, network, time) for time in TIMES]
    np.testing.assert_allclose(found, expected(TIMES, steps), rtol=1e-4)
    assert [kind == "full" for kind in network.calls] == [9 - index in steps for index in range(10)]


@pytest.mark.parametrize("told", [lambda t: t, lambda t: t / 1000, lambda t: 1 - t / 1000])
@pytest.mark.parametrize("first", [900, 1000])  # 1000 / 1000 is 1, which is also a timestep of the next chain
def test_the_first_call_tells_in_which_unit_the_network_is_told_the_time(told, first):
    times = np.array([first, *TIMES[1:], 1])
    followed, network = Followed(scheduler(times), 4, USUAL), Network()
    found = [call(followed, network, time, told=told) for time in times]
    np.testing.assert_allclose(found, expected(times, spread(11, 4)), rtol=1e-4)


def test_each_call_of_a_step_has_its_own_residuals_and_rows():
    followed, network = Followed(scheduler(), 5, IDENTITY), Network()
    rows = [(1.0, -3.0), (7.0, 0.5, 2.0), (4.0,)]
    found = [[call(followed, network, time, x) for x in rows] for time in TIMES]
    for number, x in enumerate(rows):
        np.testing.assert_allclose([step[number] for step in found], expected(TIMES, spread(10, 5), x), rtol=1e-4)


@pytest.mark.parametrize("broken_after", range(1, 10))
@pytest.mark.parametrize("same_timesteps", [False, True])
def test_a_chain_that_was_broken_off_leaves_nothing(broken_after, same_timesteps):
    """With the same array of timesteps a chain begins at the first one of them, unless the first call was the last."""
    given = scheduler()
    followed, network = Followed(given, 4, IDENTITY), Network()
    alone = [call(followed, network, time) for time in TIMES]
    for time in TIMES[:broken_after]:
        call(followed, network, time, (5.0, 6.0))
    if not same_timesteps:
        given.timesteps = TIMES.copy()
    elif broken_after == 1:
        with pytest.raises(UsageError, match=r"step 2 .* 1 times.*expect 2"):
            [call(followed, network, time) for time in TIMES]
        return
    network.calls.clear()
    np.testing.assert_array_equal([call(followed, network, time) for time in TIMES], alone)
    assert network.calls.count("full") == 4


def test_the_next_chain_may_have_other_steps_and_rows():
    given = scheduler()
    followed, network = Followed(given, 4, IDENTITY), Network()
    for times, x in ((TIMES, (1.0, 2.0)), (TIMES[::2], (3.0,)), (np.linspace(900, 1, 30).round(), (1.0,) * 5)):
        given.timesteps = times
        found = [call(followed, network, time, x) for time in times]
        np.testing.assert_allclose(found, expected(times, spread(len(times), 4), x), rtol=1e-3)


def test_a_chain_that_begins_late_counts_its_own_steps():
    """Image to image, or the second one of two networks that share a chain."""
    followed, network = Followed(scheduler(), 4, IDENTITY), Network()
    found = [call(followed, network, time) for time in TIMES[4:]]
    np.testing.assert_allclose(found, expected(TIMES[4:], spread(6, 4)), rtol=1e-4)


def test_timesteps_that_rounding_makes_the_same_are_told_apart_by_the_schedulers_count():
    """bfloat16 has 8 bits: from 512 on its numbers are 4 apart. Residuals are extrapolated in the scheduler's."""

    def rounded(time):
        return float(np.round(time / 4) * 4)

    times = np.linspace(997.3, 700, 150)
    assert len({rounded(time) for time in times}) < len(times)
    assert abs(rounded(times[0]) - times[0]) > abs(rounded(times[0]) - times[1])  # the next one is nearer
    for first in (0, 61):
        given = scheduler(times)
        given.step_index, given.begin_index = None, first  # as diffusers' are before the first step
        followed, network = Followed(given, 30, IDENTITY), Network()
        found = []
        for index, time in enumerate(times[first:], start=first):
            found.append([call(followed, network, time, told=rounded, precision=2**-7) for _ in range(2)])
            given.step_index = index + 1
        steps = spread(150 - first, 30)
        for number in range(2):
            np.testing.assert_allclose([step[number] for step in found], expected(times[first:], steps), rtol=1e-3)
        assert network.calls.count("full") == 60


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps():
    """Of a chain, 2 residuals and the result for each row, and nothing of the chains before it."""
    given, x = scheduler(np.arange(60)[::-1] + 1), np.ones(1000)
    followed = Followed(given, 20, IDENTITY)
    most = {}
    tracemalloc.start()
    for chain in range(4):
        given.timesteps = given.timesteps.copy()
        for time in given.timesteps:
            call(followed, Network(), time, x)
            most[chain] = max(most.get(chain, 0), tracemalloc.get_traced_memory()[0])
            if time == 50:
                after_ten = tracemalloc.get_traced_memory()[0]
        assert tracemalloc.get_traced_memory()[0] < after_ten + 2000  # half a residual
    tracemalloc.stop()
    assert most[3] < most[1] + 2000


def test_a_call_out_of_order_is_refused_and_the_next_one_begins_a_chain():
    followed, network = Followed(scheduler(), 4, IDENTITY), Network()
    alone = [call(followed, network, time) for time in TIMES]
    for time in TIMES[:3]:
        call(followed, network, time)
    for wrong in (420, 800, 650.5):
        followed = Followed(scheduler(), 4, IDENTITY)
        for time in TIMES[:3]:
            call(followed, network, time)
        with pytest.raises(UsageError, match=rf"called at timestep {wrong:g}; expected 650 or 500.*SimpleNamespace"):
            call(followed, network, wrong)
        np.testing.assert_array_equal([call(followed, network, time) for time in TIMES], alone)
    with pytest.raises(UsageError, match="at timestep 5; expected 10, "):
        call(followed, network, 5)


def test_more_or_fewer_calls_in_a_step_than_in_the_first_one_are_refused():
    """They would be taken for those of another prompt."""
    network = Network()
    for each, other, message in ((2, 1, "step 3 .* 1 times; .*expect 2"), (2, 3, "step 3 .* 3 times; .*expect 2")):
        followed = Followed(scheduler(), 4, IDENTITY)
        for time in (900, 900, 800, 800)[: 2 * each]:
            call(followed, network, time)
        for _ in range(min(each, other)):
            call(followed, network, 650)
        with pytest.raises(UsageError, match=message):
            call(followed, network, 500 if other < each else 650)
    followed = Followed(scheduler(), 4, IDENTITY)
    for _ in range(4):
        call(followed, network, 900)
    with pytest.raises(UsageError, match=r"step 1 .* 5 times.*at most 4"):
        call(followed, network, 900)


def test_other_rows_within_a_chain_are_refused():
    followed = Followed(scheduler(), 4, IDENTITY)
    for time in TIMES[:2]:
        call(followed, Network(), time)
    with pytest.raises(UsageError, match=r"1 rows at step 3 .*began with 2"):
        call(followed, Network(), 650, (1.0,))


@pytest.mark.parametrize(
    ("times", "full", "time", "message"),
    [
        ([900, 700, 700, 500, 500], 3, 900, "SimpleNamespace visits a timestep twice"),
        (TIMES, 4, 899, "at timestep 899, which is none of the 10 of SimpleNamespace"),
        ([], 4, 899, "none of the 0"),
        (TIMES, 14, 900, "14 full calls of 10 steps; expected 3 to 10"),
        (TIMES, 2, 900, "2 full calls of 10 steps; expected 3 to 10"),
        ([900, 800], 3, 900, "3 full calls of 2 steps; expected 3 steps or more"),
        (TIMES, (0, 8), 900, "full calls at steps 0, 8 of a chain of 10; .*8 and 9"),
        (TIMES, (0, 12), 900, "0, 12 of a chain of 10"),
    ],
)
def test_a_chain_that_cannot_be_forecast_is_refused(times, full, time, message):
    followed = Followed(scheduler(times), full, IDENTITY)
    with pytest.raises(UsageError, match=message):
        call(followed, Network(), time)


def test_a_scheduler_without_timesteps_yet_is_refused():
    followed = Followed(SimpleNamespace(timesteps=None), 4, IDENTITY)
    with pytest.raises(UsageError, match="none of the 0"):
        call(followed, Network(), 900)


@pytest.mark.parametrize("full", [1.5, ["a"], None])
def test_full_calls_are_a_number_or_steps(full):
    with pytest.raises(UsageError, match=r"full calls .*expected how many, or a list of their steps"):
        Followed(scheduler(), full, IDENTITY)


def test_a_failed_call_ends_its_chain():
    """The engine's error is the caller's; a chain that begins after it is whole."""

    class Fails(Network):
        def forecast(self, inputs):
            raise RuntimeError("the engine failed")

    given = scheduler()
    followed, network = Followed(given, 4, IDENTITY), Network()
    alone = [call(followed, network, time) for time in TIMES]
    given.timesteps = TIMES.copy()
    with pytest.raises(RuntimeError, match="the engine failed"):
        [call(followed, Fails(), time, (5.0, 6.0)) for time in TIMES]
    np.testing.assert_array_equal([call(followed, network, time) for time in TIMES], alone)
