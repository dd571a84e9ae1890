"""Bits of each input in each group of timesteps: the beam, the errors that it adds up, and the table."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support import tiny_model
from tqdit.calibration import bit_search
from tqdit.calibration.bit_search import beam, frontier, joined, measure, pareto, thinned
from tqdit.calibration.capture import Samples
from tqdit.calibration.config import PRESETS, QuantizationConfig
from tqdit.calibration.flow import calibrate
from tqdit.calibration.layers import plan
from tqdit.calibration.methods.gptq import temporal_weights
from tqdit.calibration.rows import CalibrationRows
from tqdit.errors import UsageError
from tqdit.quantization.fold import fold
from tqdit.quantization.table import ScaleTable

SMALL = {"steps": 12, "groups": 3, "rows_per_group": 8, "chains": 2, "candidates": 20}
ADATSQ = replace(PRESETS["adatsq"], activation_bits=6, **SMALL)
CHOICES = (4, 6, 8)


def bits_of(table: ScaleTable) -> dict[str, list[int]]:
    return {
        site.module: site.quantizer.arrays()["group_bits"].tolist()
        for site in table.sites
        if site.quantizer.scheme == "asymmetric_bits" and site.module.startswith("blocks")
    }


def random_errors(seed: int, groups: int = 2, layers: int = 2) -> np.ndarray:
    """Errors (G, L, B) that fall by about 16 with two bits more."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(size=(groups, layers, 1)) * 2)
    return size * 2.0 ** (-2 * np.array(CHOICES)) * rng.uniform(0.8, 1.25, (groups, layers, len(CHOICES)))


def total(errors: np.ndarray, policy: bit_search.Policy) -> float:
    return sum(errors[g, layer, at] for g, each in enumerate(policy) for layer, at in enumerate(each))


def bits(policy: bit_search.Policy) -> float:
    return float(np.mean([CHOICES[at] for each in policy for at in each]))


@pytest.mark.parametrize("seed", range(10))
def test_the_beam_finds_nearly_the_best_of_all_policies(seed: int) -> None:
    errors = random_errors(seed)
    groups = list(itertools.product(range(3), repeat=2))
    every = [policy for policy in itertools.product(groups, groups) if bits(policy) <= 6]
    found = beam(errors, CHOICES, 6)
    assert all(bits(policy) <= 6 for policy in found)
    assert [total(errors, policy) for policy in found] == sorted(total(errors, policy) for policy in found)
    assert total(errors, found[0]) <= 1.3 * min(total(errors, policy) for policy in every)
    assert total(errors, found[0]) <= total(errors, ((1, 1), (1, 1)))


def test_a_large_problem_spends_its_budget_where_errors_are() -> None:
    errors = random_errors(0, groups=10, layers=24)
    errors[:5] *= 100
    best = beam(errors, CHOICES, 6)[0]
    assert 5.9 < bits(best) <= 6
    assert bits(best[:5]) > bits(best[5:]) + 1


def test_a_front_has_neither_more_bits_nor_more_error_than_another() -> None:
    states = [(4, 3.0, ()), (2, 5.0, ()), (3, 5.0, ()), (4, 2.0, ()), (6, 2.0, ()), (7, 1.0, ())]
    front = pareto(states)
    assert front == [(2, 5.0, ()), (4, 2.0, ()), (7, 1.0, ())]
    assert thinned(front, 2) == [front[0], front[-1]]


def test_a_layer_whose_error_does_not_fall_keeps_few_bits_longest() -> None:
    errors = np.array([[1.0, 1.0, 1.0], [8.0, 1.0, 0.9]])
    assert frontier(errors, CHOICES)[:3] == [(0, 0), (0, 1), (0, 2)]


def test_weights_over_time_are_a_softmax_of_the_mean_gradients() -> None:
    u, group = torch.tensor([1.0, 3.0, 8.0, 8.0, 0.0]), torch.tensor([0, 0, 1, 1, 2])
    means = np.array([2.0, 8.0, 0.0])
    for temperature in (0.5, 2.0):
        e = np.exp(means / means.mean() / temperature)
        found = temporal_weights(u, group, temperature)
        np.testing.assert_allclose(found, (e / e.sum())[group], rtol=1e-5)


def test_errors_are_those_of_the_product_of_a_float_weight_by_group() -> None:
    model, rng = tiny_model(), np.random.default_rng(0)
    entry = next(each for each in plan(model, ADATSQ.for_model(model)) if each.name == "blocks.0.mlp.fc1")
    x, g = rng.normal(size=(6, 8, 16)).astype(np.float32), rng.normal(size=(6, 8, 64)).astype(np.float32)
    weight, group = rng.normal(size=(64, 16)).astype(np.float32), np.array([0, 0, 1, 1, 2, 2])
    ranges = {"left": (torch.from_numpy(x.min((1, 2))), torch.from_numpy(x.max((1, 2))))}
    samples = Samples(torch.from_numpy(x), None, torch.from_numpy(g**2), ranges)
    nothing = torch.zeros(0)
    rows = CalibrationRows({}, nothing, torch.from_numpy(group), nothing, nothing)
    found = []
    for k in (4, 8):
        errors, quantizer, _ = measure(entry, samples, torch.from_numpy(weight), rows, k, ADATSQ)
        s, o = (quantizer.arrays()[name][group].reshape(6, 1, 1) for name in ("scale", "zero_point"))
        quantized = (np.clip(np.round(x / s) + o, 0, 2**k - 1) - o) * s
        wrong = g**2 * ((quantized - x) @ weight.T) ** 2
        expected = np.zeros(3)
        np.add.at(expected, group, wrong[:, :: bit_search.THINNED].sum((1, 2)))
        np.testing.assert_allclose(errors, expected, rtol=1e-3)
        found.append((errors, quantizer))
    assert (found[1][0] < 0.1 * found[0][0]).all()
    mixed = joined([quantizer for _, quantizer in found], [1, 0, 1]).arrays()
    assert mixed["group_bits"].tolist() == [8, 4, 8]
    np.testing.assert_array_equal(mixed["scale"], [found[b][1].scale[g] for g, b in enumerate((1, 0, 1))])


@pytest.mark.slow
def test_a_table_has_at_most_the_bits_of_the_budget_and_its_settings_give_it_again(tmp_path: Path) -> None:
    model = tiny_model()
    table = calibrate(model, replace(ADATSQ, equalize=False), tmp_path / "a").table
    found = bits_of(table)
    assert len(found) == 8
    assert np.mean(list(found.values())) <= 6
    assert {each for bits in found.values() for each in bits} == {4, 6, 8}
    assert calibrate(model, QuantizationConfig.of_settings(table.settings), tmp_path / "b").table == table


@pytest.mark.slow
def test_a_killed_search_ends_with_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = tiny_model(), bit_search.choose
    expected = calibrate(model, ADATSQ, tmp_path / "a").table

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bit_search, "choose", dies)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, ADATSQ, tmp_path / "b")
    monkeypatch.setattr(bit_search, "choose", whole)
    assert calibrate(model, ADATSQ, tmp_path / "b").table == expected


@pytest.mark.slow
def test_the_whole_network_decides_between_survivors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it prefers the first policy, that with the same bits everywhere, all inputs have those."""
    errors = iter(range(100))
    monkeypatch.setattr("tqdit.calibration.end_to_end.EndToEnd.error", lambda *_: next(errors))
    found = bits_of(calibrate(tiny_model(), ADATSQ, tmp_path).table)
    assert {each for bits in found.values() for each in bits} == {6}
    assert 2 <= next(errors) <= bit_search.SURVIVORS + 1


@pytest.mark.slow
def test_the_whole_network_has_its_divisors_in_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched, real = [], bit_search.run

    def run(space: Any, capture: Any, whole: Any, *rest: Any) -> Any:
        searched.append(whole.model)
        return real(space, capture, whole, *rest)

    monkeypatch.setattr(bit_search, "run", run)
    model = tiny_model()
    table = calibrate(model, replace(ADATSQ, equalize="range"), tmp_path).table
    divided = [site.module for site in table.sites if site.divisor is not None]
    folded, _ = fold(model, table)
    assert divided
    for name in divided:
        assert torch.equal(searched[0].weight(name), folded.weight(name))
        assert not torch.equal(searched[0].weight(name), model.weight(name))


@pytest.mark.slow
def test_with_as_many_bits_as_there_are_nothing_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(bit_search, "measure")
    found = bits_of(calibrate(tiny_model(), replace(ADATSQ, activation_bits=8), tmp_path).table)
    assert {each for bits in found.values() for each in bits} == {8}


@pytest.mark.slow
def test_layers_with_bits_of_their_own_keep_them(tmp_path: Path) -> None:
    config = replace(ADATSQ, overrides="blocks.0.mlp.fc1:group_bits=3/4/5")
    assert bits_of(calibrate(tiny_model(), config, tmp_path).table)["blocks.0.mlp.fc1"] == [3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bit_choices": "4/8"}, "--bit-choices is '4/8'"),
        ({"bit_choices": "6/9"}, "--bit-choices is '6/9'"),
        ({"bit_choices": "6,8"}, "--bit-choices is '6,8'"),
        ({"inputs": "asymmetric"}, "--inputs is 'asymmetric'"),
        ({"time_groups": "softmax"}, "--time-groups is 'softmax'"),
        ({"group_bits": "8/6/4"}, "--group-bits .* --bit-search"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        calibrate(tiny_model(), replace(ADATSQ, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"metric": "mse"}, {"method": "search"}, {"fisher_temperature": -1.0}])
def test_a_temperature_needs_what_it_weighs(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--fisher-temperature"):
        replace(ADATSQ, **changes)
