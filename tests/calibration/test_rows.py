"""Calibration rows: where they come from and that every group has its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from support import reference_chain, tiny_model
from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.data import data_rows, read_data
from tqdit.calibration.rows import CalibrationRows, Trajectory, make_rows, pick, random_requests, renoise, sampling_of
from tqdit.errors import FileFormatError, UsageError
from tqdit.models.loaded import LoadedModel
from tqdit.ports import Port
from tqdit.quantization.table import even_boundaries
from tqdit.sampling import samplers
from tqdit.sampling.schedule import SamplingSpec

TOYS = Path(__file__).parent.parent / "toys"
SMALL = QuantizationConfig(steps=20, groups=4, rows_per_group=6, chains=2, guidance_scale=1.5)


def run(model: LoadedModel, config: QuantizationConfig) -> tuple[Trajectory, CalibrationRows]:
    trajectory = Trajectory(model, config, pick(model, config))
    trajectory.run()
    return trajectory, trajectory.rows()


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["published", "diffusers"])
def test_chains_are_those_of_the_sampler(origin: str) -> None:
    model = tiny_model(origin)
    trajectory, _ = run(model, SMALL)
    labels = trajectory.requests["class_labels"]
    expected = reference_chain(model, sampling_of(model, SMALL), labels, 1.5, seed=0)
    np.testing.assert_allclose(trajectory.chains.x, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guided", [True, False])
def test_rows_are_states_of_the_chains(guided: bool) -> None:
    model = tiny_model() if guided else unguided()
    config, states, each = SMALL if guided else replace(SMALL, guidance_scale=None), {}, 1 + guided
    trajectory = Trajectory(model, config, pick(model, config))
    timesteps = trajectory.spec.schedule.timesteps
    states[trajectory.next_step] = trajectory.chains.x.copy()
    trajectory.run(lambda step: states.update({step - 1: trajectory.chains.x.copy()}))
    rows, picks = trajectory.rows(), trajectory.picks
    assert len(rows) == 4 * 6 == each * len(picks.step)
    for index, (step, chain) in enumerate(zip(picks.step, picks.chain, strict=True)):
        for row in range(each * index, each * index + each):
            np.testing.assert_array_equal(rows.inputs["x"][row], states[int(step)][int(chain)])
            assert rows.inputs["timestep"][row] == timesteps[step]
        assert rows.inputs["class_labels"][each * index] == trajectory.requests["class_labels"][chain]


def test_the_rows_of_a_pair_differ_only_in_the_label() -> None:
    _, rows = run(tiny_model(), SMALL)
    for values in (rows.inputs["x"], rows.inputs["timestep"], rows.step, rows.group):
        assert torch.equal(values[0::2], values[1::2])
    labels = rows.inputs["class_labels"]
    assert (labels[1::2] == 5).all()  # the null class
    assert (labels[0::2] < 5).all()


def unguided() -> LoadedModel:
    return replace(tiny_model(), guidance=None)


@pytest.mark.slow
def test_the_rows_of_an_unguided_model_are_single_and_may_be_odd() -> None:
    _, rows = run(unguided(), replace(SMALL, rows_per_group=5, guidance_scale=None))
    assert len(rows) == 20
    assert (rows.inputs["class_labels"] < 5).all()
    with pytest.raises(UsageError, match=r"--rows-per-group is 5.*even"):
        pick(tiny_model(), replace(SMALL, rows_per_group=5))


@pytest.mark.slow
def test_states_enter_the_network_as_the_sampler_scales_them() -> None:
    model = tiny_model()
    schedule = model.sampling.choose(20).schedule
    scaled = replace(schedule, input_scale=np.linspace(0.5, 2, 20))
    trajectory, plain = run(model, SMALL)

    class Scaled:
        schedule, steps, process = scaled, 20, model.sampling.process

    rows = make_rows(
        model, cast("SamplingSpec", Scaled), trajectory.picks, trajectory.states, trajectory.requests,
        np.zeros_like(trajectory.states),
    )  # fmt: skip
    factor = torch.from_numpy(scaled.input_scale).float()[rows.step].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(rows.inputs["x"], plain.inputs["x"] * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("steps", "groups"), [(20, 4), (20, 1), (7, 3), (11, 10), (250, 10), (100, 7), (1000, 1000)])
def test_each_group_gets_its_rows_from_its_own_timesteps(steps: int, groups: int) -> None:
    model = tiny_model()
    config = replace(SMALL, steps=steps, groups=groups)
    picks, timesteps = pick(model, config), sampling_of(model, config).schedule.timesteps
    assert np.bincount(picks.group, minlength=groups).tolist() == [3] * groups
    boundaries = even_boundaries(groups)
    assert (picks.boundaries == boundaries).all()
    assert (np.searchsorted(boundaries, timesteps[picks.step], side="right") == picks.group).all()
    assert set(picks.chain) <= {0, 1}


@pytest.mark.parametrize(("steps", "groups"), [(4, 5), (3, 10), (10, 1000)])
def test_a_group_without_rows_is_refused(steps: int, groups: int) -> None:
    config = replace(SMALL, steps=steps, groups=groups)
    with pytest.raises(UsageError, match="has no timestep of a chain of"):
        pick(tiny_model(), config)


def test_many_rows_of_a_group_spread_over_its_steps_and_all_chains() -> None:
    config = replace(SMALL, steps=250, groups=10, rows_per_group=32, chains=8)
    picks = pick(tiny_model(), config)
    for group in range(10):
        members = picks.group == group
        assert len(set(picks.step[members])) >= 12
        assert set(picks.chain[members]) == set(range(8))


@pytest.mark.slow
def test_the_seed_decides_the_rows() -> None:
    model = tiny_model()
    first, again, other = (run(model, replace(SMALL, seed=seed))[1] for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors().values(), again.tensors().values(), strict=True))
    assert not torch.equal(first.inputs["x"], other.inputs["x"])


def assert_chains_resume(model: LoadedModel, config: QuantizationConfig) -> None:
    picks = pick(model, config)
    first = Trajectory(model, config, picks)
    saved = {}
    first.run(lambda step: saved.update({step: {name: tensor.clone() for name, tensor in first.state_dict().items()}}))
    second = Trajectory(model, config, picks)
    second.load_state_dict(saved[7])
    assert second.next_step == 6
    second.run()
    state = model.signature.state.name
    assert torch.equal(second.rows().inputs[state], run(model, config)[1].inputs[state])


@pytest.mark.slow
def test_chains_go_on_from_a_saved_state() -> None:
    assert_chains_resume(tiny_model(), SMALL)


@pytest.mark.slow
def test_chains_that_look_back_go_on_from_a_saved_state(
    two_streams: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "__path__", [*samplers.__path__, str(TOYS / "samplers")])
    model = replace(two_streams, sampling=two_streams.sampling.choose(sampler="adams_bashforth"))
    assert_chains_resume(model, replace(SMALL, steps=12, guidance_scale=None))


@pytest.mark.slow
def test_renoised_rows_have_the_noise_that_they_say() -> None:
    model = tiny_model()
    spec, picks = sampling_of(model, SMALL), pick(model, SMALL)
    x0 = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    rows = renoise(model, spec, picks, x0, {"class_labels": np.array([1, 3])}, seed=0)
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[rows.inputs["timestep"].numpy()].reshape(-1, 1, 1, 1)
    expected = np.sqrt(abar) * x0[picks.chain].repeat(2, 0) + np.sqrt(1 - abar) * rows.target.numpy()
    np.testing.assert_allclose(rows.inputs["x"], expected, rtol=1e-5, atol=1e-6)
    assert 0.9 < rows.target.std() < 1.1
    assert rows.inputs["class_labels"][0::2].tolist() == [[1, 3][chain] for chain in picks.chain]


@pytest.mark.slow
def test_renoised_rows_of_a_rectified_flow_lead_from_noise_to_data(two_streams: LoadedModel) -> None:
    config = replace(SMALL, steps=12, guidance_scale=None)
    spec, picks = sampling_of(two_streams, config), pick(two_streams, config)
    x0 = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
    rows = renoise(two_streams, spec, picks, x0, random_requests(two_streams.signature, 2, 0), seed=0)
    t = rows.inputs["sigma"].numpy().reshape(-1, 1, 1)
    clean = x0[picks.chain]
    # x_t = x_0 + t (noise - x_0)
    np.testing.assert_allclose(rows.inputs["latents"], clean + t * rows.target.numpy(), rtol=1e-4, atol=1e-5)
    assert rows.inputs["words"].shape == (24, 4)


@pytest.mark.slow
def test_requests_of_real_numbers_cannot_be_drawn(two_streams: LoadedModel) -> None:
    text = Port("text", "request", "float32", (None, 3, 4))
    signature = replace(two_streams.signature, ports=(*two_streams.signature.ports, text))
    with pytest.raises(UsageError, match="'text' takes float32"):
        random_requests(signature, 2, 0)


@pytest.mark.slow
def test_a_data_set_gives_rows_of_its_own_images(tmp_path: Path) -> None:
    model = tiny_model(pixels=True)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "data.npz", arr_0=images, arr_1=np.arange(5))
    data = read_data(tmp_path / "data.npz", model)
    assert data.requests["class_labels"].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(data.x0, images.transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
    rows = data_rows(model, sampling_of(model, SMALL), SMALL, data)
    assert len(rows) == 24
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[rows.inputs["timestep"].numpy()]
    labels = rows.inputs["class_labels"].numpy()
    for row in range(0, 24, 2):
        expected = abar[row] ** 0.5 * data.x0[labels[row]] + (1 - abar[row]) ** 0.5 * rows.target[row].numpy()
        np.testing.assert_allclose(rows.inputs["x"][row], expected, atol=1e-5)


@pytest.mark.slow
def test_data_of_a_model_without_classes_have_the_values_of_its_ports(tmp_path: Path, two_streams: LoadedModel) -> None:
    """Two axes, four words in place of a class, flow matching, no guidance."""
    rng = np.random.default_rng(0)
    states, words = rng.normal(size=(3, *two_streams.signature.state.row_shape)), np.arange(12).reshape(3, 4) % 7
    np.savez(tmp_path / "data.npz", latents=states.astype(np.float32), words=words)
    rows = data_rows(two_streams, sampling_of(two_streams, SMALL), SMALL, read_data(tmp_path / "data.npz", two_streams))
    for row, target in enumerate(rows.target.numpy()):
        (image,) = np.flatnonzero((rows.inputs["words"][row].numpy() == words).all(1))
        sigma, noise = rows.inputs["sigma"][row].item(), target + states[image]  # the network predicts noise - x_0
        expected = (1 - sigma) * states[image] + sigma * noise
        np.testing.assert_allclose(rows.inputs["latents"][row], expected, atol=1e-5)
    np.savez(tmp_path / "data.npz", latents=states.astype(np.float32), labels=np.zeros(3, int))
    with pytest.raises(UsageError, match="none of words"):
        read_data(tmp_path / "data.npz", two_streams)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "none of class_labels, arr_1, labels"),
        ({"other": np.zeros(2), "labels": np.zeros(2, int)}, "none of arr_0, images"),
        ({"images": np.zeros((2, 9, 9, 3), np.uint8), "labels": np.zeros(2, int)}, r"the model works on \[3, 8, 8\]"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros(3, int)}, "2 images, but 3 of"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.array([0, 5])}, r"labels outside 0\.\.4"),
        ({"x": np.full((2, 3, 8, 8), np.nan, np.float32), "y": np.zeros(2, int)}, "NaN"),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(UsageError, match=message):
        read_data(tmp_path / "data.npz", tiny_model(pixels=True))


@pytest.mark.slow
def test_a_damaged_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(FileFormatError, match="damaged"):
        read_data(tmp_path / "data.npz", tiny_model(pixels=True))
    with pytest.raises(UsageError, match="no such file"):
        read_data(tmp_path / "none.npz", tiny_model(pixels=True))
