"""The sampling loop against its formulas in float64, whatever runs beside a chain."""

from dataclasses import replace

import numpy as np
import pytest

import reference
from tqdit.errors import BackendError, SamplingError
from tqdit.ports import Port, Signature
from tqdit.sampling import noise
from tqdit.sampling.chains import Chains, run
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.process import Diffusion, Flow
from tqdit.sampling.schedule import SamplingSpec, Schedule

SHAPE = (3, 4, 4)
DDPM = SamplingSpec(Diffusion(learned_variance=True), "ddpm", 12)


def signature(extra=3):
    """State, whole timestep, a class of 5 with a null value, a text without one; `extra` channels of the prediction."""
    return Signature(
        ports=(
            Port("x", "state", "float32", (None, *SHAPE)),
            Port("t", "time", "int64", (None,)),
            Port("label", "request", "int64", (None,), null=5, values=6),
            Port("text", "request", "float32", (None, 2)),
        ),
        output=(None, SHAPE[0] + extra, *SHAPE[1:]),
        family="Toy",
    )


def network(inputs):
    """Mixes everything that it is fed, each row alone; float32 in, float32 out."""
    x = inputs["x"].astype(np.float64)
    bias = np.sin(inputs["t"] / 100 + 7 * inputs["label"]) + inputs["text"] @ [0.5, -0.25]
    first = 0.3 * x + np.tanh(bias)[:, None, None, None]
    return np.concatenate([first, np.sin(3 * x)], axis=1).astype(np.float32)


def request(row):
    return {"label": row % 5, "text": np.array([row, 1 - row], np.float32)}


def lagging(steps=9):
    """A table with every feature: two steps back, scaled inputs, noise of fixed variance."""
    rng = np.random.default_rng(3)
    weights = rng.uniform(-0.5, 0.5, (2, steps, 3))
    for age in (1, 2):
        weights[:, steps - age :, age] = 0
    return Schedule(
        rng.uniform(0, 999, steps).round(), weights[0], weights[1], rng.uniform(0, 1, steps),
        rng.uniform(0.5, 2, steps), initial_scale=3.0,
    )  # fmt: skip


def written_out(schedule, row, scale, seed, image):
    """A chain as `Schedule` describes it, in float64 and without buffers."""
    told = {name: np.asarray(value)[None] for name, value in request(row).items()}
    x = schedule.initial_scale * noise.normal(seed, image, noise.INITIAL, SHAPE).astype(np.float64)[None]
    history = []
    for step in reversed(range(len(schedule))):
        fed = {"x": (schedule.input_scale[step] * x).astype(np.float32), "t": schedule.timesteps[step : step + 1]}
        output = network(fed | told).astype(np.float64)
        if scale is not None and (schedule.guided is None or schedule.guided[step]):
            output = reference.guide(output, network(fed | told | {"label": np.array([5])}), scale, SHAPE[0])
        history.insert(0, (x, output[:, : SHAPE[0]]))
        sigma = schedule.noise_weight[step]
        if schedule.log_variance is not None:
            low, high = (bound[step] for bound in schedule.log_variance)
            sigma = sigma * np.exp((low + (output[:, SHAPE[0] :] + 1) / 2 * (high - low)) / 2)
        x = sigma * noise.normal(seed, image, step, SHAPE)
        for age in range(schedule.lag + 1):
            if age < len(history):
                state, prediction = history[age]
                x = x + schedule.state_weights[step, age] * state + schedule.output_weights[step, age] * prediction
    return x[0]


SCHEDULES = {
    "ddpm": DDPM.schedule, "ddim": DDPM.choose(7, "ddim").schedule, "fixed variance": SamplingSpec(steps=5).schedule,
    "euler": SamplingSpec(Flow(), "euler", 5).schedule, "lag": lagging(),
    "interval": DDPM.choose(6, "dpm++2m", guidance_interval=(300, 700)).schedule,
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("guided", [True, False])
def test_a_chain_follows_its_table(name, guided):
    """float32 against float64: 1e-4 of the largest value."""
    chains = Chains(signature(), Guidance(1.5) if guided else None, 3)
    for row in range(3):
        chains.add(SCHEDULES[name], request(row), 1.0 + row, 9, row + 40)
    done = run(chains, network)
    for row in range(3):
        expected = written_out(SCHEDULES[name], row, 1.0 + row if guided else None, 9, row + 40)
        np.testing.assert_allclose(done[row], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_chain_does_not_depend_on_its_place_or_its_neighbours_bit_for_bit():
    """Chains of all schedules come and go in one object; each ends as it does alone."""
    alone = {}
    for number, schedule in enumerate(SCHEDULES.values()):
        lone = Chains(signature(), Guidance(1.5), 1)
        lone.add(schedule, request(number), 2.0, number, 7)
        alone[number] = run(lone, network)[0].copy()
    rng = np.random.default_rng(0)
    chains, running, waiting, done = Chains(signature(), Guidance(1.5), 4), [], 20 * list(range(len(SCHEDULES))), 0
    rng.shuffle(waiting)
    while waiting or running:
        while waiting and len(running) < 4 and rng.random() < 0.7:
            number = waiting.pop()
            assert chains.add(list(SCHEDULES.values())[number], request(number), 2.0, number, 7) == len(running)
            running.append(number)
        if not running:
            continue
        assert chains.advance(network(chains.inputs())).all()
        for place in reversed(range(len(running))):
            if chains.step_of(place) < 0:
                np.testing.assert_array_equal(chains.x[place], alone[running[place]])
                done += 1
            if chains.step_of(place) < 0 or rng.random() < 0.01:
                chains.remove(place)
                last = running.pop()
                if place < len(running):
                    running[place] = last
    assert done > 60


def test_the_rows_of_a_call_are_conditional_then_unconditional():
    chains = Chains(signature(), Guidance(1.5), 4)
    for row in range(2):
        chains.add(DDPM.schedule, request(row), 1.5, 0, row)
    inputs = chains.inputs()
    assert {name: len(values) for name, values in inputs.items()} == {"x": 4, "t": 4, "label": 4, "text": 4}
    assert inputs["label"].tolist() == [0, 1, 5, 5]
    assert inputs["text"].tolist() == [[0, 1], [1, 0], [0, 1], [1, 0]]  # has no null value: both rows hold the same
    assert inputs["t"].tolist() == 4 * [999]
    assert inputs["t"].dtype == np.int64
    np.testing.assert_array_equal(inputs["x"][:2], inputs["x"][2:])
    np.testing.assert_array_equal(inputs["x"][0], noise.normal(0, 0, noise.INITIAL, SHAPE))


def test_a_step_outside_the_guidance_interval_computes_no_unconditional_row():
    chains, rows = Chains(signature(), Guidance(1.5), 3), []
    chains.add(SCHEDULES["interval"], request(0), 1.5, 0, 0)
    chains.add(DDPM.choose(6, "dpm++2m").schedule, request(1), 1.5, 0, 1)
    while chains.step_of(0) >= 0:
        inputs = chains.inputs()
        rows.append(inputs["label"].tolist())
        chains.advance(network(inputs))
    guided = [300 <= t <= 700 for t in (999, 832, 666, 500, 333, 166)]
    assert rows == [[0, 1, 5, 5] if each else [0, 1, 5] for each in guided]


def test_a_call_with_fewer_unconditional_rows_must_return_as_many():
    chains = Chains(signature(), Guidance(1.5), 1)
    chains.add(SCHEDULES["interval"], request(0), 1.5, 0, 0)
    chains.inputs()
    with pytest.raises(BackendError, match=r"for \(1, 6, 4, 4\)"):
        chains.advance(np.zeros((2, 6, *SHAPE[1:]), np.float32))


def test_a_fractional_time_port_is_told_fractions():
    ports = tuple(replace(port, dtype="float32") if port.kind == "time" else port for port in signature().ports)
    chains = Chains(replace(signature(), ports=ports), None, 1)
    chains.add(SamplingSpec(Flow(shift=3.0), "euler", 3).schedule, request(0), 1.0, 0, 0)
    assert chains.inputs()["t"].dtype == np.float32
    chains.advance(network(chains.inputs()))
    assert chains.inputs()["t"][0] == pytest.approx(1000 * 2 / (1 + 2 * 2 / 3))


@pytest.mark.parametrize("schedule", ["ddpm", "lagging"])
def test_chains_go_on_from_a_snapshot(schedule):
    table = DDPM.schedule if schedule == "ddpm" else lagging()
    whole, rest = (Chains(signature(), Guidance(1.5), 2) for _ in range(2))
    for chains in (whole, rest):
        for row in range(2):
            chains.add(table, request(row), 2.0, 3, row)
    for _ in range(5):
        whole.advance(network(whole.inputs()))
    kept = whole.snapshot()
    expected = run(whole, network).copy()
    rest.restore(kept)
    np.testing.assert_array_equal(run(rest, network), expected)


def test_a_network_may_reuse_the_buffer_of_its_output():
    buffer = np.empty((4, 6, *SHAPE[1:]), np.float32)

    def reuses(inputs):
        assert not np.shares_memory(buffer, inputs["x"])
        buffer[: len(inputs["x"])] = network(inputs)
        return buffer[: len(inputs["x"])]

    ends = []
    for each in (network, reuses):
        chains = Chains(signature(), Guidance(1.5), 2)
        for row in range(2):
            chains.add(lagging(), request(row), 2.0, 0, row)
        ends.append(run(chains, each))
    np.testing.assert_array_equal(*ends)


def test_the_steps_are_reported_from_the_first_to_the_last():
    chains, steps = Chains(signature(), None, 1), []
    chains.add(DDPM.schedule, request(0), 1.0, 0, 0)
    run(chains, network, steps.append)
    assert steps == list(reversed(range(12)))


def test_a_chain_that_is_not_finite_is_named():
    def breaks(inputs):
        output = network(inputs)
        if inputs["t"][0] == SCHEDULES["ddpm"].timesteps[4]:
            output[1, 0, 0, 0] = np.nan
        return output

    chains = Chains(signature(), None, 2)
    for row in range(2):
        chains.add(DDPM.schedule, request(row), 1.0, 0, row + 8)
    with pytest.raises(SamplingError, match=r"image 9 \(label 1\) became NaN or infinite at step 4"):
        run(chains, breaks)


def test_noise_without_weight_is_none_whatever_the_network_predicts():
    """At a chain's last step exp(v / 2) may overflow: beside a chain that has noise it must not become NaN."""
    chains = Chains(signature(), None, 2)
    chains.add(DDPM.schedule, request(0), 1.0, 0, 0)
    for _ in range(len(DDPM.schedule) - 1):
        chains.advance(np.zeros((1, 6, *SHAPE[1:]), np.float32))
    chains.add(DDPM.schedule, request(0), 1.0, 0, 0)
    output = np.zeros((2, 6, *SHAPE[1:]), np.float32)
    output[0, 3:] = 1e6
    assert chains.advance(output).all()


def test_an_output_of_another_shape_is_refused():
    chains = Chains(signature(), Guidance(1.5), 1)
    chains.add(DDPM.schedule, request(0), 1.0, 0, 0)
    with pytest.raises(BackendError, match=r"shape \(2, 3, 4, 4\) for \(2, 6, 4, 4\)"):
        chains.advance(np.zeros((2, *SHAPE), np.float32))
