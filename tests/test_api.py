"""The public names, and the Python of README.md and docs/python.md as it stands, on a tiny checkpoint."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import support
import tqdit
from tqdit.cli.main import main
from tqdit.errors import UsageError

ROOT = Path(__file__).parents[1]
BUILDING = ("torch", "onnx", "onnx_ir", "onnxruntime", "openvino", "diffusers")


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tiny pixel model of random weights, tiny.safetensors, which beside a card with its facts."""
    from safetensors.torch import save_file

    save_file(support.tiny_model(pixels=True).network.state_dict(), tmp_path / "tiny.safetensors")
    card = {"space": "pixels", "heads": 2, "class_names": list("abcde")}
    (tmp_path / "tiny.json").write_text(json.dumps(card))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(blocks):
    names = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number}", "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_the_readme_takes_a_model_through_the_flow():
    (code,) = blocks_of("README.md")
    assert code.count('"demo"') == 1
    names = run([code.replace('"demo"', '"tiny.safetensors"')])
    assert names["images"].shape == (4, 8, 8, 3)
    assert names["images"].dtype == np.uint8
    assert names["manifest"].audit.fallen_back == ()
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_the_guide_runs():
    names = run(blocks_of("docs/python.md"))
    assert names["images"].shape == names["quick"].shape == (4, 8, 8, 3)
    assert np.any(names["images"] != names["quick"])
    assert names["served"].shape == (3, 8, 8, 3)
    assert names["prediction"].shape == (2, 6, 8, 8)
    assert names["manifest"].precision == "int8"
    assert Path("float.engine", "manifest.json").is_file()
    command = "sample model.engine -n 5 --steps 3 --format npz --shard-size 4 -o samples/"
    assert main(command.split()) == 0
    assert run(blocks_of("docs/sampling-many.md"))["count"] == 5


def test_the_guide_names_every_public_name():
    table = (ROOT / "docs" / "python.md").read_text("utf-8").partition("## Load")[0]
    assert set(re.findall(r"^\| `(\w+)", table, re.MULTILINE)) == set(tqdit.__all__)
    assert all(getattr(tqdit, name) is not None for name in tqdit.__all__)


def test_importing_the_package_loads_no_stage():
    code = f"import sys, tqdit; print([name for name in {BUILDING!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
def test_an_unknown_preset_or_knob_is_refused_by_name(place):
    with pytest.raises(UsageError, match=r"'fastest'.*tq-dit.*fast"):
        tqdit.calibrate("tiny.safetensors", preset="fastest")
    with pytest.raises(UsageError, match=r"'bits'.*weight_bits"):
        tqdit.calibrate("tiny.safetensors", bits=4)
    with pytest.raises(UsageError, match=r"'cuda'.*onnxruntime, openvino"):
        tqdit.calibrate("tiny.safetensors", backend="cuda")
    assert {path.name for path in place.iterdir()} == {"tiny.safetensors", "tiny.json"}


@pytest.mark.slow
def test_a_file_of_another_program_is_overwritten_by_force_alone(place):
    from tqdit.errors import OutputError

    (place / "mine.onnx").write_text("mine")
    with pytest.raises(OutputError, match=r"mine\.onnx"):
        tqdit.export("tiny.safetensors", "mine.onnx")
    assert (place / "mine.onnx").read_text() == "mine"
