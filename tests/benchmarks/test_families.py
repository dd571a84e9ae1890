"""The benchmark of families works on networks of no size: each is called, and one has every engine compared."""

import importlib.util
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "families.py"
FAMILIES = ("pixart-sigma", "sd3.5-medium", "flux", "sana")


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARK.parent))
    try:
        spec = importlib.util.spec_from_file_location("benchmark_of_families", BENCHMARK)
        module = sys.modules["benchmark_of_families"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARK.parent))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_of_each_family_takes_its_calls(benchmark, family):
    make, published = benchmark.FAMILIES[family]
    network, example = make(benchmark.Shape(*benchmark.TINY[family], 8))
    benchmark.randomize(network)
    call = example(torch.Generator().manual_seed(0))
    assert torch.isfinite(network(**call).sample).all()
    assert published[1] * published[2] in (1152, 1536, 3072, 2240)  # the published width


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_engine_of_a_family_is_timed_and_right(benchmark, tmp_path, monkeypatch, capsys):
    arguments = ["--tiny", "--size", "64", "--rounds", "3", "--threads", "1", "--only", "flux"]
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), *arguments, "--json", str(tmp_path / "out.json")])
    benchmark.main()
    shown = capsys.readouterr().out
    facts = json.loads((tmp_path / "out.json").read_text())
    names = ["ONNX Runtime float32", "OpenVINO default"] + ["OpenVINO int8 weights"] * bool(find_spec("nncf"))
    names += ["ours fast, ONNX Runtime", "ours fast, OpenVINO"]
    assert [(row["family"], row["name"]) for row in facts["rows"]] == [("flux", name) for name in names]
    for row in facts["rows"]:
        assert len(row["milliseconds"]) == 3
        limit = 1e-9 if row["name"] == "ONNX Runtime float32" else 0.02
        assert row["error"] < limit, row
        assert f"| {row['family']} | {row['name']} |" in shown
    assert {"cpu", "torch", "onnxruntime", "openvino"} <= facts["machine"].keys()
