"""The benchmark of families works on networks of no size: every engine is built, timed and compared."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import tqdit

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "families.py"
FAMILIES = ("pixart-sigma", "sd3.5-medium", "flux", "sana")


@pytest.mark.slow
def test_every_engine_of_every_family_is_timed_and_right(tmp_path):
    command = [sys.executable, BENCHMARK, "--tiny", "--size", "64", "--rounds", "3", "--threads", "1"]
    paths = [str(Path(tqdit.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [*command, "--json", tmp_path / "out.json"], check=True, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    facts = json.loads((tmp_path / "out.json").read_text())
    names = ["ONNX Runtime float32", "OpenVINO default"] + ["OpenVINO int8 weights"] * bool(find_spec("nncf"))
    names += ["ours fast, ONNX Runtime", "ours fast, OpenVINO"]
    assert [(row["family"], row["name"]) for row in facts["rows"]] == [(f, name) for f in FAMILIES for name in names]
    for row in facts["rows"]:
        assert len(row["milliseconds"]) == 3
        limit = 1e-9 if row["name"] == "ONNX Runtime float32" else 0.02
        assert row["error"] < limit, row
        assert f"| {row['family']} | {row['name']} |" in result.stdout
    assert {"cpu", "torch", "onnxruntime", "openvino"} <= facts["machine"].keys()
