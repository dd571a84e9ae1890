"""What the two wheels of this repository hold: `tqdit`, lean, and `tqdit-demo`, the demo model's weights."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def test_the_runtime_s_wheel_is_lean_and_whole(wheel):
    assert wheel.stat().st_size < 400_000
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = (ROOT / "src" / "tqdit").rglob("*")
    wanted = {str(path.relative_to(ROOT / "src")) for path in sources if path.suffix in (".py", ".typed", ".jinja")}
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_demo_s_wheel_holds_the_weights(tmp_path):
    wheel = built(ROOT / "demo-weights", ["pyproject.toml", "LICENSE", "tqdit_demo"], tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {f"tqdit_demo/{name}" for name in ("__init__.py", "model.safetensors", "judge.safetensors")}
