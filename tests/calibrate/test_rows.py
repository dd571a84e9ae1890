"""Calibration rows: where they come from and that every group has its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from support import reference_chain, tiny_model
from tqdit.calibrate.config import QuantizationConfig
from tqdit.calibrate.data import data_rows, read_data
from tqdit.calibrate.rows import CalibrationRows, Chains, pick, renoise, sampling_of
from tqdit.errors import FileFormatError, UsageError
from tqdit.models.loaded import LoadedModel
from tqdit.quantization.table import even_boundaries

SMALL = QuantizationConfig(steps=20, groups=4, rows_per_group=6, chains=2, guidance_scale=1.5)


def run(model: LoadedModel, config: QuantizationConfig) -> tuple[Chains, CalibrationRows]:
    spec = sampling_of(model, config)
    chains = Chains(model, spec, config, pick(spec, config))
    while chains.next_step >= 0:
        chains.advance()
    return chains, chains.rows()


@pytest.mark.parametrize("origin", ["published", "diffusers"])
def test_chains_are_those_of_the_sampler(origin: str) -> None:
    model = tiny_model(origin)
    chains, _ = run(model, SMALL)
    expected = reference_chain(model, sampling_of(model, SMALL), chains.labels.numpy(), 1.5, seed=0)
    np.testing.assert_allclose(chains.x.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_rows_are_states_of_the_chains() -> None:
    model = tiny_model()
    spec, states = sampling_of(model, SMALL), {}
    chains = Chains(model, spec, SMALL, pick(spec, SMALL))
    while chains.next_step >= 0:
        states[chains.next_step] = chains.x
        chains.advance()
    rows, picks = chains.rows(), chains.picks
    for index, (step, chain) in enumerate(zip(picks.step, picks.chain, strict=True)):
        assert torch.equal(rows.x[2 * index], states[int(step)][int(chain)])
        assert rows.timestep[2 * index] == spec.schedule.timesteps[step]


def test_the_rows_of_a_pair_differ_only_in_the_label() -> None:
    _, rows = run(tiny_model(), SMALL)
    for values in (rows.x, rows.timestep, rows.step, rows.group):
        assert torch.equal(values[0::2], values[1::2])
    assert (rows.label[1::2] == 5).all()  # the null class
    assert (rows.label[0::2] < 5).all()


@pytest.mark.parametrize(("steps", "groups"), [(20, 4), (20, 1), (7, 3), (11, 10), (250, 10), (100, 7), (1000, 1000)])
def test_each_group_gets_its_rows_from_its_own_timesteps(steps: int, groups: int) -> None:
    model = tiny_model()
    config = replace(SMALL, steps=steps, groups=groups)
    spec = sampling_of(model, config)
    picks = pick(spec, config)
    assert np.bincount(picks.group, minlength=groups).tolist() == [3] * groups
    boundaries = even_boundaries(groups)
    assert (np.searchsorted(boundaries, spec.schedule.timesteps[picks.step], side="right") == picks.group).all()
    assert set(picks.chain) <= {0, 1}


@pytest.mark.parametrize(("steps", "groups"), [(4, 5), (3, 10), (10, 1000)])
def test_a_group_without_rows_is_refused(steps: int, groups: int) -> None:
    config = replace(SMALL, steps=steps, groups=groups)
    with pytest.raises(UsageError, match="has no timestep of a chain of"):
        pick(sampling_of(tiny_model(), config), config)


def test_many_rows_of_a_group_spread_over_its_steps_and_all_chains() -> None:
    config = replace(SMALL, steps=250, groups=10, rows_per_group=32, chains=8)
    picks = pick(sampling_of(tiny_model(), config), config)
    for group in range(10):
        members = picks.group == group
        assert len(set(picks.step[members])) >= 12
        assert set(picks.chain[members]) == set(range(8))


def test_the_seed_decides_the_rows() -> None:
    model = tiny_model()
    first, again, other = (run(model, replace(SMALL, seed=seed))[1] for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors().values(), again.tensors().values(), strict=True))
    assert not torch.equal(first.x, other.x)


def test_chains_go_on_from_a_saved_state() -> None:
    model = tiny_model()
    spec = sampling_of(model, SMALL)
    picks = pick(spec, SMALL)
    first = Chains(model, spec, SMALL, picks)
    for _ in range(9):
        first.advance()
    second = Chains(model, spec, SMALL, picks)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    while second.next_step >= 0:
        second.advance()
    assert torch.equal(second.rows().x, run(model, SMALL)[1].x)


def test_renoised_rows_have_the_noise_that_they_say() -> None:
    model = tiny_model()
    spec = sampling_of(model, SMALL)
    x0, picks = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), pick(spec, SMALL)
    rows = renoise(model, spec, picks, x0, torch.tensor([1, 3]), seed=0)
    abar = torch.from_numpy(spec.schedule.alphas_cumprod)[rows.step].reshape(-1, 1, 1, 1).float()
    expected = abar.sqrt() * x0[picks.chain].repeat_interleave(2, 0) + (1 - abar).sqrt() * rows.noise
    torch.testing.assert_close(rows.x, expected)
    assert 0.9 < rows.noise.std() < 1.1


def test_a_data_set_gives_rows_of_its_own_images(tmp_path: Path) -> None:
    model = tiny_model(pixels=True)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "data.npz", arr_0=images, arr_1=np.arange(5))
    data = read_data(tmp_path / "data.npz", model)
    assert data.x0.min() >= -1
    assert data.x0.max() <= 1
    rows = data_rows(model, sampling_of(model, SMALL), SMALL, data)
    assert len(rows) == 24
    clean = rows.step == rows.step.min()
    assert (rows.x[clean] - rows.noise[clean] * 0.05).abs().max() < 2  # close to an image


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "none of arr_1, labels"),
        ({"other": np.zeros(2), "labels": np.zeros(2, int)}, "none of arr_0, images"),
        ({"images": np.zeros((2, 9, 9, 3), np.uint8), "labels": np.zeros(2, int)}, r"the model works on \[3, 8, 8\]"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros(3, int)}, "expected 2 integers"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.array([0, 5])}, r"labels outside 0\.\.4"),
        ({"x": np.full((2, 3, 8, 8), np.nan, np.float32), "y": np.zeros(2, int)}, "NaN"),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(UsageError, match=message):
        read_data(tmp_path / "data.npz", tiny_model(pixels=True))


def test_a_damaged_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(FileFormatError, match="damaged"):
        read_data(tmp_path / "data.npz", tiny_model(pixels=True))
    with pytest.raises(UsageError, match="no such file"):
        read_data(tmp_path / "none.npz", tiny_model(pixels=True))
