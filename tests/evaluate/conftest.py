"""The demo model through the flow at five steps: a scale table, an int8 engine and a float one, made once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from support import exported, made_once
from tqdit.cli.main import run
from tqdit.demo.glyphs import draw
from tqdit.quantization.table import read_scale_table

SMALL = ["--steps", "5", "--groups", "2", "--rows-per-group", "4", "--chains", "2", "--candidates", "10"]


def make_flow(folder: Path) -> None:
    """Calibrate, export and build."""
    from tqdit.engines.build.engine import build_engine
    from tqdit.exporter.graph import ExportConfig
    from tqdit.exporter.onnx_writer import write

    table_file = folder / "scales.safetensors"
    bits = ["--weight-bits", "6", "--activation-bits", "6"]
    assert run("calibrate", ["demo", "-o", str(table_file), "--preset", "ho", "-q", *SMALL, *bits]) == 0
    for name, table in (("model", read_scale_table(table_file)), ("float", None)):
        write(folder / f"{name}.onnx", *exported(ExportConfig(steps=5, sampler="ddpm"), "demo", table=table))
        build_engine(folder / f"{name}.onnx", folder / f"{name}.engine")


@pytest.fixture(scope="session")
def flow() -> Path:
    """A folder with scales.safetensors, model.engine (W6A6) and float.engine."""
    return made_once("flow", make_flow)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 drawings of the demo data set."""
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    pixels, labels = draw(200, 1)
    np.savez(path, arr_0=pixels, arr_1=labels)
    return path


@pytest.fixture(scope="session")
def done(flow: Path, reference: Path) -> tuple[Path, dict]:
    """A copy of `flow` with one evaluation of the int8 engine: float engine, seeds, layers, report."""

    def evaluate(folder: Path) -> None:
        shutil.copytree(flow, folder, dirs_exist_ok=True)
        arguments = [
            folder / "model.engine", "--against", folder / "float.engine", "--reference", reference, "-n", 64,
            "--layers", "--diagnosed", "1", "--report", folder / "report.html", "-o", folder / "evaluation.json", "-q",
        ]  # fmt: skip
        assert run("evaluate", [str(argument) for argument in arguments]) == 0

    folder = made_once("evaluation", evaluate)
    return folder, json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="session")
def done_report(done: tuple[Path, dict]) -> tuple[dict, str]:
    """Its JSON and its page."""
    return done[1], (done[0] / "report.html").read_text()
