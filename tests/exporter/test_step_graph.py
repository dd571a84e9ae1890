"""The exported step graph equals the PyTorch model plus the papers' update, and the loop on the host.

Tolerances: the reference computes everything but the network in float64, the graph in float32, and the two networks sum
in different orders. One step: |x| is about 4, its weight up to 1.01, so 2e-5 is about 40 ulp. A chain of 20 steps
carries such errors on; 2e-4 (relative to the largest value) covers what we see (2e-5) ten times.
"""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import support
from support import normal_rows
from tables import random_rows
from tqdit.errors import UsageError
from tqdit.exporter.graph import ExportConfig, export_graph
from tqdit.exporter.onnx_writer import write
from tqdit.onnx_file import OnnxFile, read_card
from tqdit.sampling import schedule as schedules
from tqdit.sampling.chains import Chains, run
from tqdit.sampling.noise import INITIAL
from tqdit.sampling.process import Flow
from tqdit.sampling.schedule import SamplingSpec, Schedule

RNG = np.random.default_rng(0)
VARIANTS = [  # each two of origin, sampler and guidance together
    ("published", "ddpm", True),
    ("published", "ddim", False),
    ("diffusers", "ddpm", False),
    ("diffusers", "ddim", True),
]
SHOWN = support.few(VARIANTS, ("published", "ddpm", True), ("published", "ddim", False), ("diffusers", "ddim", True))


def open_session(path, graph, card):
    write(path, graph, card)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Session, model and card of each variant, exported once."""
    made = {}

    def get(origin, sampler, guided):
        key = (origin, sampler, guided)
        if key not in made:
            graph, card = support.exported(ExportConfig("step", sampler=sampler, guided=guided), origin)
            path = tmp_path_factory.mktemp("step") / "model.onnx"
            made[key] = open_session(path, graph, card), support.tiny_model(origin), card
        return made[key]

    return get


def random_inputs(rows, steps, guided):
    inputs = {
        "x": RNG.standard_normal((rows, 4, 8, 8), np.float32),
        "step": RNG.integers(0, steps, rows),
        "class_labels": RNG.integers(0, 6, rows),  # with the null class
        "noise": RNG.standard_normal((rows, 4, 8, 8), np.float32),
    }
    if guided:
        inputs["guidance_scale"] = RNG.uniform(0, 5, rows).astype(np.float32)
    return inputs


@pytest.mark.slow
@pytest.mark.parametrize(("origin", "sampler", "guided"), SHOWN)
@pytest.mark.parametrize("rows", [1, 5])
def test_one_step_with_rows_at_different_steps(exported, origin, sampler, guided, rows):
    session, model, card = exported(origin, sampler, guided)
    inputs = random_inputs(rows, card.sampling.steps, guided)
    inputs["step"][0] = card.sampling.steps - 1  # always with the noisiest and, if there is room, the cleanest step
    inputs["step"][-1] = 0 if rows > 1 else card.sampling.steps - 1
    (x_next,) = session.run(["x_next"], inputs)
    for row in range(rows):
        one = {name: values[row : row + 1] for name, values in inputs.items()}
        scale = float(one["guidance_scale"][0]) if guided else None
        expected = support.reference_step(
            model, card.sampling, one["x"].astype(np.float64), int(one["step"][0]), one["class_labels"], scale,
            one["noise"],
        )  # fmt: skip
        np.testing.assert_allclose(x_next[row : row + 1], expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


def run_steps(session, spec, seed, requests, scale, count=3):
    """A chain by the step graph alone, as an embedder writes it."""
    shape = tuple(session.get_inputs()[0].shape[1:])
    x = normal_rows(seed, np.arange(count), INITIAL, shape)
    for step in reversed(range(spec.steps)):
        inputs = {"x": x, "step": np.full(count, step), "noise": normal_rows(seed, np.arange(count), step, shape)}
        if scale is not None:
            inputs["guidance_scale"] = np.full(count, scale, np.float32)
        (x,) = session.run(["x_next"], inputs | requests)
    return x


def run_loop(model, card, seed, requests, scale, count=3):
    """The same chain by the loop on the host, with the PyTorch network."""
    chains = Chains(model.signature, card.guidance, count)
    for image in range(count):
        request = {name: values[image] for name, values in requests.items()}
        chains.add(card.sampling.schedule, request, 1.0 if scale is None else scale, seed, image)
    return run(chains, model)


@pytest.mark.slow
@pytest.mark.parametrize(("origin", "sampler", "guided"), SHOWN)
def test_a_whole_chain_of_20_steps(exported, origin, sampler, guided):
    session, model, card = exported(origin, sampler, guided)
    labels, scale = np.array([0, 4, 5]), 2.0 if guided else None
    x = run_steps(session, card.sampling, 3, {"class_labels": labels}, scale)
    expected = support.reference_chain(model, card.sampling, labels, scale, seed=3)
    looped = run_loop(model, card, 3, {"class_labels": labels}, scale)
    assert np.abs(expected).max() > 0.5  # the chain went somewhere
    for found in (expected, looped):
        np.testing.assert_allclose(x, found, rtol=0, atol=2e-4 * max(1, np.abs(expected).max()))


@pytest.mark.slow
def test_a_flow_model_is_sampled_by_euler(tmp_path):
    """The published tiny model, taken for one that learned a rectified flow and reads a float in 0..1000."""
    model = support.tiny_model()
    ports = tuple(replace(port, dtype="float32") if port.kind == "time" else port for port in model.signature.ports)
    flow = SamplingSpec(Flow(shift=2), "euler", 10)
    model = replace(model, signature=replace(model.signature, ports=ports), sampling=flow)
    session = open_session(tmp_path / "model.onnx", *(made := export_graph(model, ExportConfig("step"))))
    labels = np.array([0, 4, 5])
    x = run_steps(session, made[1].sampling, 3, {"class_labels": labels}, 2.0)
    u = np.arange(11) / 10
    t = 2 * u / (1 + u)
    expected = normal_rows(3, np.arange(3), INITIAL, (4, 8, 8)).astype(np.float64)
    for step in reversed(range(10)):
        told = np.full(3, 1000 * t[step + 1], np.float32)
        rows = {"x": expected.astype(np.float32), "timestep": told}
        c, n = (model(rows | {"class_labels": y}).astype(np.float64)[:, :4] for y in (labels, np.full(3, 5)))
        velocity = n + 2.0 * (c - n)
        velocity[:, 3:] = c[:, 3:]  # the published guidance moves three channels
        expected = expected + (t[step] - t[step + 1]) * velocity
    np.testing.assert_allclose(x, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_a_schedule_that_looks_back_is_refused_in_one_line(monkeypatch):
    made = support.tiny_model().sampling.schedule
    lagging = Schedule(
        made.timesteps, np.pad(made.state_weights, [(0, 0), (0, 1)]), np.pad(made.output_weights, [(0, 0), (0, 1)]),
        made.noise_weight, made.input_scale,
    )  # fmt: skip
    monkeypatch.setattr(schedules, "make_schedule", lambda _: lagging)
    with pytest.raises(UsageError, match=r"'ddpm' looks back at 1 steps.*--graph denoiser") as error:
        export_graph(support.tiny_model(), ExportConfig("step"))
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["published", "diffusers"])
def test_the_denoiser_graph_is_the_network(tmp_path, origin):
    model = support.tiny_model(origin)
    session = open_session(tmp_path / "model.onnx", *support.exported(ExportConfig(), origin))
    described = {value.name: (value.type, value.shape) for value in [*session.get_inputs(), *session.get_outputs()]}
    state = model.signature.state.name
    assert state == {"published": "x", "diffusers": "hidden_states"}[origin]
    assert described == {
        state: ("tensor(float)", ["batch", 4, 8, 8]), "timestep": ("tensor(int64)", ["batch"]),
        "class_labels": ("tensor(int64)", ["batch"]), "prediction": ("tensor(float)", ["batch", 8, 8, 8]),
    }  # fmt: skip
    inputs = random_rows(model.signature, 3, last=999)
    (prediction,) = session.run(["prediction"], inputs)
    expected = model(inputs)
    assert prediction.shape == (3, 8, 8, 8)
    np.testing.assert_allclose(prediction, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_unguided_graphs_have_no_guidance_input_and_noise_always_stays(exported):
    for origin, sampler, guided in VARIANTS:
        session, _, card = exported(origin, sampler, guided)
        names = [value.name for value in session.get_inputs()]
        assert ("guidance_scale" in names) == guided == (card.guidance is not None)
        assert {"x", "step", "class_labels", "noise"} <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize(("origin", "sampler"), [("published", "ddpm"), ("diffusers", "ddim")])
def test_inputs_and_outputs_are_those_of_the_contract(exported, origin, sampler):
    session, _, _ = exported(origin, sampler, True)
    described = {value.name: (value.type, value.shape) for value in [*session.get_inputs(), *session.get_outputs()]}
    image = ["batch", 4, 8, 8]
    assert described == {
        "x": ("tensor(float)", image), "step": ("tensor(int64)", ["batch"]), "noise": ("tensor(float)", image),
        "class_labels": ("tensor(int64)", ["batch"]), "guidance_scale": ("tensor(float)", ["batch"]),
        "x_next": ("tensor(float)", image),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("graph", "steps"), [("denoiser", 7), ("step", 20)])
def test_the_file_passes_the_full_checker_and_holds_its_card(tmp_path, graph, steps):
    path = tmp_path / "model.onnx"
    made, card = support.exported(ExportConfig(graph, steps=steps), "diffusers")
    write(path, made, card)
    onnx.checker.check_model(str(path), full_check=True)
    assert read_card(path) == card
    assert (card.sampling.steps, card.sampling.sampler, card.sampling.process.spacing) == (steps, "ddim", "leading")
    assert OnnxFile.read(path).model.producer_name == "tqdit"
