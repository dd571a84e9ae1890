"""Group boundaries where the activations drift."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from support import tiny_model
from tqdit.calibration.config import PRESETS, QuantizationConfig
from tqdit.calibration.drift import place_boundaries
from tqdit.calibration.flow import calibrate
from tqdit.calibration.rows import Trajectory, every_state, sampling_of
from tqdit.errors import UsageError

SMALL = QuantizationConfig(steps=12, groups=3, rows_per_group=4, chains=2, candidates=20, boundaries="drift")


def spread(x, starts):
    """Squared distances to the mean of each group."""
    return sum(np.square(part - part.mean(0)).sum() for part in np.split(x, starts))


@pytest.mark.parametrize("groups", [1, 2, 3, 9])
def test_no_other_grouping_has_steps_that_are_more_alike(groups):
    x = np.random.default_rng(groups).normal(size=(9, 4)).cumsum(0)
    timesteps = np.arange(9) * 100 + 7
    found = np.searchsorted(timesteps, place_boundaries(x, timesteps, groups))
    best = min(spread(x, starts) for starts in combinations(range(1, 9), groups - 1))
    assert spread(x, found) == pytest.approx(best, abs=1e-9)


def test_boundaries_are_the_first_timesteps_of_steps_that_differ():
    x = np.repeat([[0.0, 1.0], [4.0, 1.0], [4.0, -3.0]], [2, 5, 3], axis=0)
    assert place_boundaries(x, np.arange(0, 1000, 100), 3).tolist() == [200, 700]


def test_more_groups_than_steps_are_refused():
    with pytest.raises(UsageError, match="--groups is 4, more than the 3 steps"):
        place_boundaries(np.zeros((3, 1)), np.arange(3), 4)


def test_every_step_is_measured_and_every_group_gets_its_rows():
    model = tiny_model()
    config = SMALL.for_model(model)
    spec = sampling_of(model, config)
    trajectory = Trajectory(model, config, every_state(spec, config))
    states = {trajectory.next_step: trajectory.chains.x.copy()}
    trajectory.run(lambda step: states.update({step - 1: trajectory.chains.x.copy()}))
    statistics = trajectory.drift.statistics.numpy()
    operands = len(model.products) + sum(product.place == "attention" for product in model.products)
    assert statistics.shape == (12, 2 * operands)
    assert (statistics.std(0) > 0).any()
    assert np.isfinite(statistics).all()
    trajectory.place_boundaries()
    rows = trajectory.rows()
    assert np.bincount(rows.group.numpy()).tolist() == [4, 4, 4]
    for index, (step, chain) in enumerate(zip(trajectory.picks.step, trajectory.picks.chain, strict=True)):
        assert (rows.inputs["x"][2 * index].numpy() == states[int(step)][int(chain)]).all()
        assert (rows.inputs["timestep"][2 * index] >= rows.boundaries).sum() == rows.group[2 * index]


@pytest.mark.slow
def test_the_table_holds_the_boundaries_and_a_resumed_run_the_same(tmp_path: Path, monkeypatch):
    model, config = tiny_model(), replace(PRESETS["tq-dit"], **{**vars(SMALL), "time_groups": "all"})
    table = calibrate(model, config, tmp_path / "a").table
    assert table.groups == 3
    call, calls = Trajectory.call, iter(range(100))

    def killed(trajectory, inputs):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return call(trajectory, inputs)

    monkeypatch.setattr(Trajectory, "call", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, config, tmp_path / "b")
    assert calibrate(model, config, tmp_path / "b").table == table


def test_a_users_own_data_have_no_drift(tmp_path: Path):
    from tqdit.calibration.data import DataSet, data_rows

    model = tiny_model()
    with pytest.raises(UsageError, match="--boundaries drift is measured"):
        data_rows(model, sampling_of(model, SMALL), SMALL, DataSet(None, {}, ""))
