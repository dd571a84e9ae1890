"""The ablation: rows that resume, tables that say what the rows say."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from support import few
from tqdit.calibration.config import PRESETS
from tqdit.console import Console
from tqdit.evaluate.bootstrap import Measure
from tqdit.quantization.table import write_scale_table

SCRIPT = Path(__file__).parents[2] / "scripts" / "ablation.py"
sys.path.insert(0, str(SCRIPT.parent))
SPEC = importlib.util.spec_from_file_location("ablation", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
module = sys.modules["ablation"] = importlib.util.module_from_spec(SPEC)  # dataclasses look their module up there
SPEC.loader.exec_module(module)
subjects = sys.modules["ablation_subjects"]
TABLES, Bench, Job, Row, Size, Store = module.TABLES, module.Bench, module.Job, module.Row, module.Size, module.Store
EngineRow = sys.modules["ablation_engines"].EngineRow
lines_of, markdown, sweep = module.lines_of, module.markdown, module.sweep

QUIET = Console(quiet=True)
SIZE = Size(steps=3, images=64, batch=32)


def fake_row(job: Job, seed: int, table: Path | None = None) -> Row:
    """Numbers that tell rows apart."""
    value = job.weight_bits + job.activation_bits / 10 + job.groups / 1000 + seed + (0 if job.preset == "float" else 10)
    measure = Measure(value, value - 0.2, value + 0.2, 64, "x", 0.1)
    names = ["frechet_distance", "accuracy", "inception_score"]
    if job.preset != "float":
        names += ["frechet_excess", "final_error", "final_error_median", "eps_error"]
    return Row(job, seed, dict.fromkeys(names, measure), 1.0, 1.0, 7.0, 40.0, "a processor")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "rows", SIZE, "f" * 64, {"tqdit": "0"})


def test_an_interrupted_sweep_goes_on_where_it_was(store):
    jobs, calls = TABLES["bits"], []

    def interrupted(job: Job, seed: int, table: Path) -> Row:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((job, seed))
        return fake_row(job, seed)

    with pytest.raises(KeyboardInterrupt):
        sweep(jobs, [0, 1], store, interrupted, QUIET)
    assert len(list(store.folder.iterdir())) == 3
    again: list[tuple[Job, int]] = []

    def measure(job: Job, seed: int, table: Path) -> Row:
        again.append((job, seed))
        return fake_row(job, seed)

    rows = sweep(jobs, [0, 1], store, measure, QUIET)
    assert calls + again == [(job, seed) for job in jobs for seed in (0, 1)]  # each one once
    assert rows == [fake_row(job, seed) for job in jobs for seed in (0, 1)]
    assert sweep(jobs, [0, 1], store, interrupted, QUIET) == rows  # nothing left to do


def test_a_damaged_row_is_measured_again(store):
    job = TABLES["bits"][0]
    sweep([job], [0], store, fake_row, QUIET)
    file = store.path(job, 0)
    file.write_text(file.read_text()[:50])
    assert store.load(job, 0) is None
    assert sweep([job], [0], store, fake_row, QUIET) == [fake_row(job, 0)]


def test_a_row_of_other_settings_is_another_file(store, tmp_path):
    job = Job("tq-dit")
    others = [
        store.path(job, 1), store.path(replace(job, groups=5), 0), store.path(replace(job, weight_bits=8), 0),
        Store(tmp_path / "rows", replace(SIZE, images=65), "f" * 64, {"tqdit": "0"}).path(job, 0),
        Store(tmp_path / "rows", SIZE, "e" * 64, {"tqdit": "0"}).path(job, 0),
        Store(tmp_path / "rows", SIZE, "f" * 64, {"tqdit": "1"}).path(job, 0),
    ]  # fmt: skip
    assert len({store.path(job, 0), *others}) == 7


def test_a_configuration_that_two_tables_share_is_measured_once(store):
    calls: list[Job] = []

    def measure(job: Job, seed: int, table: Path) -> Row:
        calls.append(job)
        return fake_row(job, seed)

    sweep([job for jobs in TABLES.values() for job in jobs], [0], store, measure, QUIET)
    assert len(calls) == len(set(calls)) == len({job for jobs in TABLES.values() for job in jobs})


def test_adjacent_rows_of_table_iii_differ_in_one_ingredient():
    """MSE -> HO: the metric; -> MRQ: the two quantizers with two regions; -> TGQ: the time groups."""
    configs = [job.config(50, 0).to_json() for job in TABLES["III"] if job.preset != "float"]
    changed = [{k for k in a if a[k] != b[k]} for a, b in itertools.pairwise(configs)]
    assert changed == [{"metric"}, {"softmax", "gelu"}, {"time_groups"}]


def test_groups_change_without_the_number_of_calibration_rows():
    for job in TABLES["groups"]:
        config = job.config(50, 0)
        assert config.groups * config.rows_per_group == module.TOTAL_ROWS
        assert config.softmax == PRESETS["tq-dit"].softmax


def test_the_limit_counts_new_rows_alone(store):
    jobs = TABLES["bits"]
    assert len(sweep(jobs, [0], store, fake_row, QUIET, limit=2)) == 2
    assert len(sweep(jobs, [0], store, fake_row, QUIET, limit=1)) == 3


def test_tables_say_what_the_rows_say(store, tmp_path):
    rows = [fake_row(job, seed) for jobs in TABLES.values() for job in jobs for seed in (0, 1)]
    rows = list({(row.job, row.seed): row for row in rows}.values())
    line = lines_of([Job("tq-dit")], rows)[0]
    assert line.measures["frechet_distance"].value == pytest.approx(6 + 0.6 + 0.01 + 0.5 + 10)
    assert line.measures["frechet_distance"].standard_error == pytest.approx(0.1 / 2**0.5)
    text = markdown(rows, SIZE, {"tqdit": "0"})
    assert "| + HO + MRQ + TGQ | W6A6 | 10 | 17.1 (17 to 17.2) |" in text
    assert "| 8.58 |" in text  # the paper's number beside
    text = markdown(rows, SIZE, {"tqdit": "0"}, "text", "28 steps of euler")
    assert "28 steps of euler" in text
    assert "8.58" not in text  # the paper has classes
    engines = {Job("fast", 8, 8): [EngineRow("openvino", "quantized products: 25 int8", 4.5, 1.7)]}
    text = markdown(rows, SIZE, {"tqdit": "0"}, engines=engines)
    assert next(line for line in text.splitlines() if line.startswith("| fast | W8A8 |")).endswith(
        "| 7 | 40 | 25 int8 | 4.5 | 1.7 |  |  |  |"
    )
    assert "PyTorch model; a processor; tqdit 0" in text
    document = tmp_path / "ablation.json"
    document.write_text(module.to_json(rows, store, {"size": {}}, engines))
    read = json.loads(document.read_text())
    again = Store(tmp_path / "empty", SIZE, "f" * 64, {"tqdit": "0"}, document)
    assert [again.load(row.job, row.seed) for row in rows] == rows
    assert Store(tmp_path / "empty", SIZE, "f" * 64, {"tqdit": "1"}, document).load(Job("tq-dit"), 0) is None
    document.write_text(json.dumps({"rows": [rows[0].to_json()]}))  # of an earlier version
    assert Store(tmp_path / "empty", SIZE, "f" * 64, {"tqdit": "0"}, document).load(Job("tq-dit"), 0) is None
    assert [(row["job"]["preset"], row["milliseconds"]) for row in read["engines"]] == [("fast", 4.5)]


@pytest.mark.slow
@pytest.mark.parametrize("model", few(["demo", "text"], "demo"))
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of diffusers and its schedulers
def test_a_real_row_and_its_float_row(model, tmp_path, monkeypatch):
    """Few steps, few rows, W8A8: near float, and again the same."""
    monkeypatch.setattr(module, "TOTAL_ROWS", 8)
    monkeypatch.setattr(subjects, "DATA_COUNT", 256)
    bench = Bench(subjects.SUBJECTS[model](SIZE.steps, SIZE.images, SIZE.batch), SIZE, tmp_path / "work", QUIET)
    job = Job("ho", 8, 8, groups=2)
    row, floating = bench.measure(job, 0), bench.measure(Job("float"), 0)
    assert set(row.measures) >= {"frechet_distance", "accuracy", "final_error", "eps_error"}
    assert 0 < row.measures["final_error_median"].value < 0.05  # the mean belongs to images that flip
    assert 0 < row.measures["eps_error"].value < 0.05
    assert "final_error" not in floating.measures
    assert floating.measures["frechet_distance"].value > 0
    assert json.loads(json.dumps(row.to_json())) == row.to_json()
    assert Row.from_json(row.to_json()) == row


@pytest.mark.slow
def test_plots_are_drawn(tmp_path):
    from support import read_picture

    rows = [fake_row(job, 0) for jobs in TABLES.values() for job in jobs]
    module.plot(rows, tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").std() > 5
    module.plot_front(rows, {}, tmp_path / "empty.png")
    engines = {job: [EngineRow("openvino", "", 4.0 + job.weight_bits, 1.7)] for job in TABLES["presets"]}
    module.plot_front(rows, engines, tmp_path / "front.png")
    empty, drawn = (read_picture(tmp_path / name) for name in ("empty.png", "front.png"))
    assert (drawn != empty).mean() > 0.005


@pytest.mark.slow
def test_a_table_is_built_timed_and_kept(tmp_path):
    from support import tiny_model
    from tables import Kind, make_table

    model = tiny_model(pixels=True)
    table = tmp_path / "row.safetensors"
    write_scale_table(table, make_table(model, Kind()))
    bench = sys.modules["ablation_engines"].EngineBench(SimpleNamespace(model=model, calls=None), tmp_path / "engines")
    assert not bench.is_kept(table)
    rows = bench.rows(table)
    assert bench.is_kept(table)
    assert [row.backend for row in rows] == ["openvino", "onnxruntime"]
    for row in rows:
        assert "0 fallen back" in row.audit
        assert row.milliseconds > 0
        assert 0.05 < row.against_float < 20
    assert bench.rows(table) == rows  # which times nothing again
