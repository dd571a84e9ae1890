"""The wheels of this repository: `tqdit`, `tqdit-runtime` for edge machines, and `tqdit-demo`, the demo's weights."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from evaluate.conftest import make_flow
from support import made_once
from tqdit.demo.weights import DIGESTS
from tqdit.version import __version__

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


def built(source, names, folder):
    """The path of the wheel of a project, built from a copy of these files and folders: nothing stays in the tree."""
    tree = folder / "tree"
    tree.mkdir()
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source / name, tree)
    subprocess.run([sys.executable, "-c", BUILD, folder], cwd=tree, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built(ROOT, ["pyproject.toml", "README.md", "LICENSE", "src"], tmp_path_factory.mktemp("tqdit"))


def files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_the_wheel_holds_every_module(wheel):
    sources = (ROOT / "src" / "tqdit").rglob("*")
    assert files(wheel) == {
        str(path.relative_to(ROOT / "src")) for path in sources if path.suffix in (".py", ".typed", ".jinja", ".html")
    }


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    return built(ROOT / "runtime", ["pyproject.toml", "LICENSE", "src"], tmp_path_factory.mktemp("runtime"))


@pytest.mark.slow
def test_the_runtime_s_wheel_is_lean(runtime):
    assert runtime.stat().st_size < 350_000
    assert not {name for name in files(runtime) if name.startswith(("tqdit/models/", "tqdit/engines/build/"))}


@pytest.mark.slow
def test_the_runtime_samples_inspects_and_names_what_it_lacks(runtime, tmp_path):
    with zipfile.ZipFile(runtime) as archive:
        archive.extractall(tmp_path)
    bundle = made_once("flow", make_flow) / "model.engine"
    lines = f"""
import sys
sys.modules |= dict.fromkeys(("torch", "onnx", "onnx_ir", "diffusers", "safetensors"))
import tqdit
from tqdit.cli.main import run
assert tqdit.__file__.startswith({str(tmp_path)!r})
assert run("sample", [{str(bundle)!r}, "-n", "2", "--steps", "4", "-q", "-o", "samples.npz"]) == 0
assert run("inspect", [{str(bundle)!r}, "--verify"]) == 0
assert run("doctor", []) == 0
assert run("doctor", ["--prove"]) == 1  # needs what makes engines
from tqdit.serve.app import make_app
from tqdit.serve.routes import page
assert make_app({{"tiny": {str(bundle)!r}}}).state.service.health().status == "ok"
assert page()[0]
try:
    tqdit.calibrate("demo")
except tqdit.errors.MissingLibraryError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", lines]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples.npz").exists()
    assert "tqdit-runtime" in done.stdout.splitlines()[-1]


def test_the_projects_have_one_version_and_one_set_of_requirements():
    whole, part, demo = (
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text("utf-8"))["project"]
        for folder in ("", "runtime", "demo-weights")
    )
    assert whole["version"] == part["version"] == demo["version"] == __version__
    assert part["dependencies"] == whole["dependencies"]
    for extra, requirements in part["optional-dependencies"].items():
        expected = [each.replace("tqdit[", "tqdit-runtime[") for each in whole["optional-dependencies"][extra]]
        assert requirements == expected


@pytest.mark.slow
def test_the_demo_s_wheel_holds_the_weights(tmp_path):
    wheel = built(ROOT / "demo-weights", ["pyproject.toml", "LICENSE", "tqdit_demo"], tmp_path)
    assert files(wheel) == {f"tqdit_demo/{name}" for name in ("__init__.py", *DIGESTS)}
