"""Columns of each layer by evolution: the bound, what is tried, resuming, and the network that comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from support import tiny_model
from tables import random_rows
from tqdit.calibration import column_search
from tqdit.calibration.column_search import ColumnSpace, evolve, space
from tqdit.calibration.config import PRESETS, QuantizationConfig
from tqdit.calibration.flow import calibrate
from tqdit.calibration.without_rows import table_without_rows
from tqdit.errors import UsageError
from tqdit.models.columns import part_widths
from tqdit.quantization.fake_quant import apply

SMALL = {"steps": 12, "groups": 3, "rows_per_group": 4, "chains": 2, "candidates": 20}
Q_DIT = replace(PRESETS["q-dit"], column_sizes="4,8,16,32,64", column_search=12, weight_bits=4, **SMALL)
LAYERS = {f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
CHOICES = {f"layer {number}": (32, 64, 128) for number in range(12)}
SPACE = ColumnSpace(CHOICES, dict.fromkeys(CHOICES, 128), 80.0)


def record(tried: list[tuple[int, ...]]) -> Callable[[tuple[int, ...]], float]:
    """A score whose best genome, without the bound, has the middle choice everywhere."""

    def score(genome: tuple[int, ...]) -> float:
        tried.append(genome)
        return float(sum((at - 1) ** 2 * (1 + number) for number, at in enumerate(genome)))

    return score


@pytest.mark.parametrize("seed", range(5))
def test_no_genome_is_below_the_bound_or_tried_twice(seed: int) -> None:
    tried: list[tuple[int, ...]] = []
    best = evolve(SPACE, 60, seed, record(tried))
    assert len(tried) == len(set(tried)) == 60
    assert tried[0] == SPACE.uniform == (2,) * 12
    assert all(SPACE.mean(genome) >= 80 for genome in tried)
    assert best == min(tried, key=record([]))


@pytest.mark.slow
def test_evolution_is_better_than_as_many_random_genomes() -> None:
    found, random = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        score = record([])
        found.append(score(evolve(SPACE, 200, seed, score)))
        random.append(min(score(SPACE.repair(rng, SPACE.random(rng))) for _ in range(200)))
    assert np.mean(found) < 0.7 * np.mean(random)


def test_the_same_seed_gives_the_same_genomes_and_another_one_others() -> None:
    runs: list[list[tuple[int, ...]]] = [[], [], []]
    for seed, tried in zip((0, 0, 1), runs, strict=True):
        evolve(SPACE, 30, seed, record(tried))
    assert runs[0] == runs[1] != runs[2]


def test_a_space_that_is_used_up_ends_the_search() -> None:
    tried: list[tuple[int, ...]] = []
    small = ColumnSpace({"a": (2, 4), "b": (2, 4)}, {"a": 4, "b": 4}, 3.0)
    assert evolve(small, 50, 0, record(tried)) in tried
    assert set(tried) == {(0, 1), (1, 0), (1, 1)}


def test_the_choices_of_a_layer_are_different_widths_of_its_parts() -> None:
    found = space(tiny_model(), [], replace(Q_DIT, column_sizes="5,6,7,20,64"))
    assert found is not None
    assert found.choices["blocks.0.attn.qkv"] == (4, 6, 16)  # of 16: 4 parts with at most 5, 3 with 6 or 7, else 1
    assert found.least == (3 * 16 + 64) / 4 / 2  # half of what whole layers have, since that is below 128
    assert part_widths(16, 6) == (6, 6, 4)


@pytest.mark.slow
def test_a_killed_search_continues_and_gives_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, evaluate = tiny_model(), column_search.Objective.error
    whole = calibrate(model, Q_DIT, tmp_path / "whole").table
    columns = whole.layer_columns
    assert set(columns) == LAYERS
    assert len(set(columns.values())) > 1
    calls = []

    def dies(self: column_search.Objective, genome: dict[str, int]) -> float:
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(genome)
        return evaluate(self, genome)

    monkeypatch.setattr(column_search.Objective, "error", dies)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, Q_DIT, tmp_path / "work")
    monkeypatch.setattr(column_search.Objective, "error", lambda s, c: calls.append(c) or evaluate(s, c))
    assert calibrate(model, Q_DIT, tmp_path / "work").table == whole
    assert len(calls) == Q_DIT.column_search


@pytest.mark.slow
def test_settings_of_a_table_give_it_again_without_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    table = calibrate(model, replace(Q_DIT, column_search=6), tmp_path / "a").table
    monkeypatch.delattr(column_search.Objective, "error")
    assert calibrate(model, QuantizationConfig.of_settings(table.settings), tmp_path / "b").table == table


@pytest.mark.slow
def test_what_was_found_has_less_error_than_the_uniform_choice(tmp_path: Path) -> None:
    model, errors = tiny_model(), []
    for count in (1, 12):
        golden = calibrate(model, replace(Q_DIT, column_search=count), tmp_path).table.golden
        assert golden is not None
        errors.append(golden.errors.mean())
    assert errors[1] < errors[0]


@pytest.mark.slow
def test_a_group_has_its_own_range_per_token_and_its_own_scale_per_channel() -> None:
    """The layer against ten lines of NumPy."""
    model, bits = tiny_model(), 4
    config = replace(PRESETS["dynamic"], inputs="dynamic_asymmetric", overrides="blocks.0.mlp.fc2:columns=24",
                     weight_bits=bits, activation_bits=bits)  # fmt: skip
    table = table_without_rows(model, config)
    x = np.random.default_rng(0).normal(size=(1, 5, 64)).astype(np.float32)
    linear = model.network.get_submodule("blocks.0.mlp.fc2")
    weight, expected, start = linear.weight.detach().numpy(), linear.bias.detach().numpy().copy(), 0
    for number, width in enumerate((22, 22, 20)):
        part, w = x[..., start : start + width], weight[:, start : start + width]
        low, high = part.min(-1, keepdims=True), part.max(-1, keepdims=True)
        s = (high - low) / (2**bits - 1)
        b = low + s * 2 ** (bits - 1)
        scale = table.by_module[f"blocks.0.mlp.fc2.columns.{number}"]["weight"].quantizer.scale[:, None]
        codes = np.clip(np.round(w / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        expected = expected + (np.round((part - b) / s) * s + b) @ (codes * scale).T
        start += width
    quantized = apply(model, table).network
    with torch.no_grad():
        found = quantized.get_submodule("network.blocks.0.mlp.fc2")(torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": 8}, "--columns .* --column-search"),
        ({"column_sizes": "32,x"}, "--column-sizes is '32,x'"),
        ({"column_sizes": "0,8"}, "--column-sizes is '0,8'"),
        ({"mean_columns": 29}, "28 columns .* --mean-columns is 29"),
        ({"inputs": "asymmetric"}, "'blocks.0.attn.qkv' has scheme 'asymmetric'"),
        ({"gelu": "two-region"}, "'blocks.0.mlp.fc2' has scheme 'gelu'"),
        ({"overrides": "blocks.0.attn.scores:columns=8"}, "'blocks.0.attn.scores' .* no linear layer"),
        ({"overrides": "final_layer.linear:columns=8"}, "'final_layer.linear' .* no linear layer"),
        ({"overrides": "blocks.0.mlp.fc1:columns=x"}, "--overrides 'blocks.0.mlp.fc1:columns=x'"),
        ({"overrides": "blocks.0.mlp.fc1:columns=65536"}, "--columns"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        calibrate(tiny_model(), replace(Q_DIT, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_export_without_rows_refuses_the_search() -> None:
    with pytest.raises(UsageError, match="--column-search needs calibration rows"):
        table_without_rows(tiny_model(), replace(PRESETS["dynamic"], column_search=5))


@pytest.mark.slow
def test_the_weighted_objective_counts_steps(tmp_path: Path) -> None:
    model = tiny_model()
    tables = [
        calibrate(model, replace(Q_DIT, column_search=4, column_objective=each), tmp_path / each).table
        for each in ("eps", "step")
    ]
    assert tables[0].settings["column_objective"] != tables[1].settings["column_objective"]
    for table in tables:
        assert np.isfinite(apply(model, table)(random_rows(model.signature, 2))).all()
