"""The exported step graph equals the PyTorch model plus the NumPy posterior.

Tolerances: the reference computes everything but the network in float64, the graph in float32, and the two networks sum
in different orders. One step: |x| is about 4, from_x up to 1.01, so 2e-5 is about 40 ulp. A chain of 20 steps carries
such errors on; 2e-4 (relative to the largest value) covers what we see (2e-5) ten times.
"""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import support
from tqdit.export import ExportConfig, export_graph, write
from tqdit.onnx_file import OnnxFile, read_card
from tqdit.sampling.noise import INITIAL, normal_rows

RNG = np.random.default_rng(0)
VARIANTS = [
    (origin, sampler, guided)
    for origin in ("published", "diffusers")
    for sampler in ("ddpm", "ddim")
    for guided in (True, False)
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Session, model and sampling spec of each variant, exported once."""
    made = {}

    def get(origin, sampler, guided):
        key = (origin, sampler, guided)
        if key not in made:
            model = support.tiny_model(origin)
            graph, card = support.exported(ExportConfig(sampler=sampler, guided=guided), origin)
            path = tmp_path_factory.mktemp("step") / "model.onnx"
            write(path, graph, card)
            options = ort.SessionOptions()
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            made[key] = session, model, card.sampling
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
@pytest.mark.parametrize(("origin", "sampler", "guided"), VARIANTS)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_one_step_with_rows_at_different_steps(exported, origin, sampler, guided, rows):
    session, model, spec = exported(origin, sampler, guided)
    inputs = random_inputs(rows, spec.steps, guided)
    inputs["step"][0] = spec.steps - 1  # always with the noisiest and, if there is room, the cleanest step
    inputs["step"][-1] = 0 if rows > 1 else spec.steps - 1
    (x_next,) = session.run(["x_next"], inputs)
    expected = support.reference_step(
        model, spec, inputs["x"].astype(np.float64), inputs["step"], inputs["class_labels"],
        inputs.get("guidance_scale"), inputs["noise"],
    )  # fmt: skip
    np.testing.assert_allclose(x_next, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


@pytest.mark.slow
@pytest.mark.parametrize(("origin", "sampler", "guided"), VARIANTS)
def test_a_whole_chain_of_20_steps(exported, origin, sampler, guided):
    session, model, spec = exported(origin, sampler, guided)
    labels, scale = np.array([0, 4, 5]), 2.0 if guided else None
    expected = support.reference_chain(model, spec, labels, scale, seed=3)
    x = normal_rows(3, np.arange(3), INITIAL, (4, 8, 8))
    for step in reversed(range(spec.steps)):
        inputs = {"x": x, "step": np.full(3, step), "class_labels": labels,
                  "noise": normal_rows(3, np.arange(3), step, (4, 8, 8))}  # fmt: skip
        if guided:
            inputs["guidance_scale"] = np.full(3, scale, np.float32)
        (x,) = session.run(["x_next"], inputs)
    assert np.abs(expected).max() > 0.5  # the chain went somewhere
    np.testing.assert_allclose(x, expected, rtol=0, atol=2e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("origin", ["published", "diffusers"])
def test_the_denoiser_graph_is_the_network(tmp_path, origin):
    model = support.tiny_model(origin)
    graph, card = support.exported(ExportConfig(graph="denoiser"), origin)
    write(tmp_path / "model.onnx", graph, card)
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = {"x": RNG.standard_normal((3, 4, 8, 8), np.float32), "timestep": np.array([0, 500, 999]),
              "class_labels": np.array([0, 3, 5])}  # fmt: skip
    (noise_pred,) = session.run(["noise_pred"], inputs)
    with torch.no_grad():
        expected = model.network(*map(torch.from_numpy, inputs.values())).numpy()
    assert noise_pred.shape == (3, 8, 8, 8)
    np.testing.assert_allclose(noise_pred, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_unguided_graphs_have_no_guidance_input_and_noise_always_stays(exported):
    for _, sampler, guided in VARIANTS:
        session, _, _ = exported("published", sampler, guided)
        names = [value.name for value in session.get_inputs()]
        assert ("guidance_scale" in names) == guided
        assert {"x", "step", "class_labels", "noise"} <= set(names)


def test_inputs_and_outputs_are_those_of_the_contract(exported):
    session, _, _ = exported("published", "ddpm", True)
    described = {value.name: (value.type, value.shape) for value in [*session.get_inputs(), *session.get_outputs()]}
    image = ["batch", 4, 8, 8]
    assert described == {
        "x": ("tensor(float)", image), "step": ("tensor(int64)", ["batch"]), "noise": ("tensor(float)", image),
        "class_labels": ("tensor(int64)", ["batch"]), "guidance_scale": ("tensor(float)", ["batch"]),
        "x_next": ("tensor(float)", image),
    }  # fmt: skip


@pytest.mark.slow
def test_two_exports_give_the_same_bytes(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        write(tmp_path / name, *export_graph(support.tiny_model(), ExportConfig()))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_the_file_passes_the_full_checker_and_holds_its_card(tmp_path):
    path = tmp_path / "model.onnx"
    graph, card = support.exported(ExportConfig(steps=7), "diffusers")
    write(path, graph, card)
    onnx.checker.check_model(str(path), full_check=True)
    assert read_card(path) == card
    assert (card.sampling.steps, card.sampling.sampler, card.sampling.spacing) == (7, "ddim", "leading")
    assert OnnxFile.read(path).model.producer_name == "tqdit"
