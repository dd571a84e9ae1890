"""kill -9 at random moments of every stage: the output is the old one, none, or the whole new one, and the same command
then ends with the bytes of an undisturbed run."""

import hashlib
import shutil
import time

import numpy as np
import pytest
import torch

from support import few, rounds
from tqdit.calibration.work import open_search
from tqdit.engines.run.shards import INDEX, read_index

pytestmark = pytest.mark.hardening
CALIBRATE = ["calibrate", "{inputs}/dit.safetensors", "--preset", "tq-dit", "--steps", "8", "--groups", "2",
             "--rows-per-group", "4", "--candidates", "4", "--rounds", "1", "-o", "{here}/scales.safetensors",
             "-q"]  # fmt: skip
EXPORT = ["export", "{here}/model.onnx", "--model", "{inputs}/dit.safetensors", "--float", "-q"]
BUILD = ["build", "{inputs}/model.onnx", "-o", "{here}/model.engine", "-q"]
SAMPLE = ["sample", "{inputs}/model.engine", "-n", "300", "--shard-size", "20", "-o", "{here}/samples", "-q"]
SHEET = ["sample", "{inputs}/model.engine", "-n", "100", "-o", "{here}/samples.png", "-q"]
STAGES = {  # command, output, kills
    "calibrate": (CALIBRATE, "scales.safetensors", 6), "export": (EXPORT, "model.onnx", 3),
    "build": (BUILD, "model.engine", 6), "shards": (SAMPLE, "samples", 10), "picture": (SHEET, "samples.png", 5),
}  # fmt: skip


def digest(path):
    """SHA-256 of a file, or of every file of a folder but the manifest, which holds a path and versions."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if not file.name.startswith("."))
    return [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]


@pytest.mark.parametrize("stage", few(STAGES, "calibrate", "build", "shards"))  # the others write one file as well
def test_a_stage_that_was_killed_at_random_ends_with_the_same_bytes(inputs, tmp_path, commands, stage):
    argv, name, kills = STAGES[stage]
    undisturbed, here = tmp_path / "undisturbed", tmp_path / "here"
    for folder in (undisturbed, here):
        folder.mkdir()

    def command(folder):
        return [part.format(inputs=inputs, here=folder) for part in argv]

    commands.run("--version")  # the first command waits until everything is imported
    started = time.monotonic()
    outcome = commands.run(*command(undisturbed))
    duration = time.monotonic() - started
    assert outcome.code == 0, outcome.err
    expected = digest(undisturbed / name)
    rng = np.random.default_rng(len(stage))
    killed = 0
    kills = rounds(kills)
    for number in range(kills):  # one in each of as many parts of the time that the command takes
        moment = duration * (number + rng.random()) / kills
        outcome = commands.run(*command(here), kill_after=moment)
        assert outcome.code in (-9, 0), outcome.err
        killed += outcome.code == -9
        if stage == "shards":
            if (here / name / INDEX).is_file():
                read_index(here / name).pending()
            if outcome.code == 0:
                shutil.rmtree(here / name)
        elif (here / name).exists():
            assert digest(here / name) == expected
    assert killed
    assert commands.run(*command(here)).code == 0
    assert digest(here / name) == expected
    assert [file.name for file in here.iterdir() if file.name.startswith(".")] == []
    assert {file.name for file in here.iterdir()} - {name} <= {f"{name}.work"}


def test_a_search_goes_at_once_when_it_is_done(tmp_path, monkeypatch):
    """A kill in the middle of its removal left tables without tokens, on which the next run failed for good."""
    folder = open_search(tmp_path, {"seed": 1}, torch.device("cpu"))
    folder.save("tokens-1", {"tokens": torch.zeros(2)})
    folder.save("tokens-2", {"tokens": torch.zeros(2)})
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)  # as far as a kill lets it come
        folder.delete()
    again = open_search(tmp_path, {"seed": 1}, torch.device("cpu"))
    assert not again.has("tokens-1")
    assert not again.has("tokens-2")
    assert [file.name for file in tmp_path.iterdir()] == []
