"""The benchmark of tqdit-serve works, briefly, and its hostile requests are refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tqdit
from serve.client import Running
from tqdit.cli.serve import LOCAL
from tqdit.serve.app import make_app
from tqdit.serve.settings import Settings

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_two_hundred_hostile_requests_each_get_one_line(bundle, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("serve_benchmark", FOLDER / "serve.py")
    module = sys.modules["serve_benchmark"] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    running = Running(make_app({"tiny": bundle}, Settings(client_s=0.5, hosts=LOCAL)))  # as the command's
    try:
        found = module.attack(running.port)
    finally:
        started = time.monotonic()
        running.stop()
    statuses = found.pop("statuses")
    assert found == {"requests": 200, "failed": [], "alive": True, "passed": True}
    assert set(statuses) == {400, 404, 405, 408, 413}  # what they ask is looked at, not only their Host
    assert time.monotonic() - started < 10


@pytest.mark.full
def test_every_part_is_measured_and_passed(bundle, tmp_path):
    command = [
        sys.executable, FOLDER / "serve.py", bundle, "--images", "8", "--steps", "5", "--rounds", "1", "--seconds", "1",
        "--minutes", "0.05", "--clients", "4", "--parts", "start,throughput,latency,soak", "--rate", "4",
        "--json", tmp_path / "out.json",
    ]  # fmt: skip
    paths = [str(Path(tqdit.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode in (0, 1), done.stderr  # memory grows in the first seconds
    facts = json.loads((tmp_path / "out.json").read_text())
    assert facts["soak"]["lost"] == []
    assert facts["soak"]["counts"]["right"] > 0
    assert not [name for name in facts["soak"]["counts"] if "WRONG" in name]
    assert 0 < facts["start"]["listening_s"] < facts["start"]["first_image_s"]
    assert facts["throughput"]["ratio"] > 0
    assert [row["load"] for row in facts["latency"]] == [0.25, 0.5, 0.75, 0.9]
    assert all(0 < row["p50_s"] <= row["p99_s"] for row in facts["latency"] if row["images"])
