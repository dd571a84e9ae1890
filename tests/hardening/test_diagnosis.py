"""What is wrong with a file is told apart: no permission, missing, empty or truncated, of another kind."""

import codecs
import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NOBODY = 65534
# file -> the command that reads it
READERS = {
    "scales.safetensors": ["inspect", "scales.safetensors"],
    "dit.safetensors": ["inspect", "dit.safetensors"],
    "zip.pt": ["inspect", "zip.pt"],
    "model.onnx": ["inspect", "model.onnx"],
    "model.engine/manifest.json": ["sample", "model.engine"],
    "model.engine/graph.onnx": ["inspect", "model.engine"],
    "shards/shards.json": ["sample", "--merge", "shards", "-o", "merged.npz"],
    "shards/shard-00001.npz": ["sample", "--merge", "shards", "-o", "merged.npz"],
    "samples.npz": ["inspect", "samples.npz"],
    "pictures/000001.png": ["evaluate", "pictures", "--reference", "reference.npz"],
    "pictures/samples.json": ["evaluate", "pictures", "--reference", "reference.npz"],
    "diagnosis.json": ["calibrate", "--from-diagnosis", "diagnosis.json"],
    "diffusers/config.json": ["inspect", "diffusers"],
}
OPTIONAL = ("pictures/000001.png", "pictures/samples.json")  # without which there is nothing wrong
HASHED = ("model.engine/graph.onnx", "shards/shard-00001.npz")  # any change of these is one line


@pytest.fixture(scope="module")
def place(inputs):
    """One good file of each kind, where other users may look."""
    import torchmetrics  # noqa: F401 (another user may not import it, nor what is looked up below)

    codecs.lookup("cp437")  # of zip files
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder, "files")
        shutil.copytree(inputs, here)
        (here / "pictures").mkdir()
        for name in ("000000.png", "000001.png"):
            Image.new("RGB", (16, 16)).save(here / "pictures" / name)
        (here / "pictures" / "samples.json").write_text(json.dumps({"classes": [0, 1]}))
        np.savez(here / "reference.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
        (here / "diagnosis.json").write_text(json.dumps({"settings": {}, "advice": [], "fingerprint": ""}))
        (here / "diffusers").mkdir()
        (here / "diffusers" / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
        for file in (Path(folder), here, *here.rglob("*")):
            file.chmod(0o777)
        yield here


@contextlib.contextmanager
def spoilt(file, content):
    """A file with other content; None: removed."""
    whole = file.read_bytes()
    try:
        file.unlink() if content is None else file.write_bytes(content)
        yield
    finally:
        file.write_bytes(whole)
        file.chmod(0o755)


@contextlib.contextmanager
def forbidden(file):
    """A file that this process may not read: root may read everything, so it becomes another user."""
    user = os.geteuid()
    file.chmod(0o000)
    try:
        if user == 0:
            os.seteuid(NOBODY)
        yield
    finally:
        os.seteuid(user)
        file.chmod(0o755)


@pytest.fixture
def line(place, run, monkeypatch):
    """line(name) -> the refusal of the command that reads this file."""
    monkeypatch.chdir(place)

    def refusal(name):
        outcome = run(*READERS[name])
        outcome.check_refusal()
        return outcome.lines[0]

    return refusal


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="users as of Unix")
@pytest.mark.parametrize("name", READERS)
def test_a_file_without_permission_is_not_called_damaged(place, line, name):
    with forbidden(place / name):
        found = line(name)
    assert f"{name}: cannot be read (Permission denied). Ask its owner for the permission." in found


@pytest.mark.parametrize("name", [name for name in READERS if name not in OPTIONAL])
def test_a_missing_file_is_called_missing(place, line, name):
    with spoilt(place / name, None):
        found = line(name)
    assert any(word in found for word in ("no such file", "missing", f"it has no {Path(name).name}", "unknown kind"))
    assert "truncated" not in found
    assert "damaged" not in found


@pytest.mark.parametrize("name", READERS)
def test_an_empty_file_is_called_empty(place, line, name):
    with spoilt(place / name, b""):
        found = line(name)
    assert "empty or truncated: 0 bytes" in found or ("0 bytes" in found and name in HASHED)


@pytest.mark.parametrize("name", [name for name in READERS if name not in HASHED])
def test_a_file_of_another_kind_is_not_called_damaged(place, line, name):
    with spoilt(place / name, b"Dear diary, today I trained a model.\n" * 100):
        found = line(name)
    assert f"{name}: not a" in found
    assert "truncated" not in found
    assert "damaged" not in found


@pytest.mark.parametrize("name", READERS)
def test_half_a_file_is_called_truncated(place, line, name):
    whole = (place / name).read_bytes()
    with spoilt(place / name, whole[: len(whole) // 2]):
        found = line(name)
    assert "truncated" in found
    assert f"{name}: not a" not in found
