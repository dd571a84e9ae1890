"""A toy family, a toy sampler, a toy scheme and a toy backend, one file or folder each, through the whole flow."""

import numpy as np
import pytest

import support
from tqdit.engines.run.sampler import Sampler
from tqdit.sampling.chains import Chains, run
from tqdit.sampling.schedule import sampler_names

REQUESTS = {"words": np.array([[1, 2, 3, 4], [0, 0, 6, 5], [6, 1, 1, 2]])}
SMALL = {"groups": 2, "rows_per_group": 5, "chains": 4, "candidates": 20, "rounds": 1, "token_share": 0.5}


@pytest.fixture
def toys(monkeypatch):
    """Every toy in its place."""
    from tqdit.engines import backends
    from tqdit.models import families
    from tqdit.quantization import schemes
    from tqdit.sampling import samplers

    for package in (families, samplers, schemes, backends):
        folder = support.TOYS / package.__name__.rpartition(".")[2]
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])


def states(model, sampler, steps=12):
    """What the loop makes of the PyTorch network."""
    spec = model.sampling.choose(steps, sampler)
    chains = Chains(model.signature, model.guidance, 3)
    for image in range(3):
        chains.add(spec.schedule, {"words": REQUESTS["words"][image]}, 1.0, 5, image)
    return run(chains, model).copy()


def test_nothing_in_the_package_names_the_toys():
    assert "adams_bashforth" not in sampler_names()


@pytest.mark.slow
@pytest.mark.usefixtures("toys")
def test_a_two_step_sampler_is_of_second_order():
    """Twice the steps, a sixteenth of the squared error; for Euler's method a quarter."""
    import tqdit

    model = tqdit.load_model("two-streams")
    exact = states(model, "adams_bashforth", 500)
    error = {
        (name, steps): np.square(states(model, name, steps) - exact).mean()
        for name in ("euler", "adams_bashforth")
        for steps in (16, 32)
    }
    assert 3 < error["euler", 16] / error["euler", 32] < 6
    assert 8 < error["adams_bashforth", 16] / error["adams_bashforth", 32] < 32


@pytest.mark.slow
@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("backend", support.few(["onnxruntime", "openvino", "plain"], "onnxruntime", "plain"))
def test_a_network_of_another_shape_takes_the_whole_flow(tmp_path, backend):
    """Two token streams, a float timestep, no guidance, flow matching."""
    import tqdit
    from tqdit.quantization.fake_quant import apply

    model = tqdit.load_model("two-streams")
    table = tqdit.calibrate(model, preset="tq-dit", inputs="power-of-two", **SMALL)
    assert {site.quantizer.scheme for site in table.sites if site.role == "input"} >= {"power-of-two"}
    tqdit.export(model, tmp_path / "toy.onnx", scales=table)
    manifest = tqdit.build(tmp_path / "toy.onnx", tmp_path / "toy.engine", backend=backend)
    if backend != "plain":  # which proves nothing
        assert manifest.audit.fallen_back == ()
        assert manifest.audit.integer == sum(bool({"input", "left"} & set(sites)) for sites in table.by_module.values())
    quantized = apply(model, table)
    with tqdit.Sampler.open(tmp_path / "toy.engine") as sampler:
        assert isinstance(sampler, Sampler)
        for name in ("euler", "adams_bashforth"):
            found = sampler.sample_latents(REQUESTS, seed=5, sampler=name)
            expected, original = states(quantized, name), states(model, name)
            loss = np.square(expected - original).sum() / np.square(original).sum()
            assert 0 < loss < 0.02
            # The engine is the fake-quantized network, except for codes that flip if floats are added in another order.
            assert np.square(found - expected).sum() / np.square(expected).sum() < max(1e-9, 0.1 * loss)
        assert np.abs(found - sampler.sample_latents(REQUESTS, seed=5, sampler="euler")).max() > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("backend", support.few(["onnxruntime", "openvino"], "openvino"))
def test_a_network_of_another_shape_needs_no_calibration(tmp_path, backend):
    import tqdit

    model = tqdit.load_model("two-streams")
    tqdit.export(model, tmp_path / "toy.onnx", preset="dynamic")
    manifest = tqdit.build(tmp_path / "toy.onnx", tmp_path / "toy.engine", backend=backend)
    assert manifest.audit.fallen_back == ()
    assert manifest.audit.integer == 14  # seven of a block, six of the last one, whose words lead nowhere, and the end
    assert manifest.verified is not None
    with tqdit.Sampler.open(tmp_path / "toy.engine") as sampler:
        found, original = sampler.sample_latents(REQUESTS, seed=5, sampler="euler", steps=12), states(model, "euler")
    assert 0 < np.square(found - original).sum() / np.square(original).sum() < 0.01
