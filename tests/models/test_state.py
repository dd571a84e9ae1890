"""Reading files that somebody else wrote: nothing runs, nothing half-read gets through, one line says why."""

import argparse
import json
import os
import pickle
import random
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tqdit.errors import CheckpointError
from tqdit.models.state import read_json, read_sharded, read_tensors

TENSORS = {f"layer.{i}": torch.full((4, 4), float(i)) for i in range(4)}


def refusal(path, read=read_tensors):
    with pytest.raises(CheckpointError) as error:
        read(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert text.endswith(".")
    return text.removeprefix(f"{path}: ")


def write(path, tensors=TENSORS):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.name.startswith("legacy"):
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(tensors, path)
    return path


FILES = ["new.pt", "legacy.pt", "new.bin", "new.pth", "new.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_tensors_come_back_as_they_were_written(name, tmp_path):
    tensors = read_tensors(write(tmp_path / name))
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)


class Hostile:
    """What an attacker puts into a pickle: loading it would create a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


class Evaluated(Hostile):
    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({str(self.victim)!r})",)


@pytest.mark.parametrize(("kind", "function"), [(Hostile, "posix.mkdir"), (Evaluated, "eval")])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["value", "ema", "opt"])
def test_pickled_code_is_refused_and_does_not_run(tmp_path, kind, function, legacy, place):
    victim = tmp_path / "victim"
    content = {
        "value": {"a": kind(victim)},
        "ema": {"ema": {"a": kind(victim)}},
        "opt": {"ema": TENSORS, "opt": kind(victim)},
    }
    torch.save(content[place], tmp_path / "dit.pt", _use_new_zipfile_serialization=not legacy)
    assert refusal(tmp_path / "dit.pt") == (
        f"refused: it holds pickled code ('{function}'), which loading would run; expected tensors alone. Convert it "
        "to safetensors if you trust it."
    )
    assert not victim.exists()
    torch.load(tmp_path / "dit.pt", weights_only=False)  # the trap is a real one
    assert victim.exists()


def test_a_plain_pickle_of_code_does_not_run(tmp_path):
    (tmp_path / "dit.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "victim"), protocol=2))
    refusal(tmp_path / "dit.pt")
    assert not (tmp_path / "victim").exists()


def test_a_whole_module_is_refused_by_the_name_of_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "dit.pt")
    assert refusal(tmp_path / "dit.pt").startswith("refused: it holds pickled code ('torch.nn.modules.linear.Linear')")


def test_the_namespace_of_dits_training_script_is_let_through(tmp_path):
    path = tmp_path / "dit.pt"
    torch.save({"ema": TENSORS, "model": {}, "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4)}, path)
    assert read_tensors(path).keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({}, "an empty dict"),
        ([1, 2], "list"),
        (torch.zeros(2), "Tensor"),
        ({"epoch": 3, "weights": TENSORS}, "a dict with keys 'epoch', 'weights'"),
        ({"layer": torch.zeros(1), "step": 7}, "a dict with keys 'layer', 'step'"),
        ({0: torch.zeros(1)}, "a dict with keys '0'"),
        ({"ema": {"decay": 0.999}}, "a dict with keys 'decay'"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content, found):
    torch.save(content, tmp_path / "dit.pt")
    assert refusal(tmp_path / "dit.pt") == (
        f"expected a state dict of tensors, flat or under 'ema', found {found}. Pass a DiT checkpoint."
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, name, part):
    path = write(tmp_path / name)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(1, int(part * len(whole)))])
    assert "Get it again." in refusal(path)


@pytest.mark.parametrize("name", ["dit.pt", "dit.safetensors"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert refusal(tmp_path / name).startswith("empty or truncated: 0 bytes, expected a ")


@pytest.mark.parametrize("name", ["dit.pt", "dit.safetensors"])
@pytest.mark.parametrize(
    "content", [b"garbage", b"\x00" * 1000, b"PK\x03\x04" + b"\x01" * 100, b"<html>404</html>" * 50]
)
def test_garbage_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert "Get it again." in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["new.pt", "legacy.pt", "new.safetensors"])
def test_whatever_bytes_are_altered_the_answer_is_tensors_or_one_line(tmp_path, name):
    path = write(tmp_path / name)
    whole, choose = path.read_bytes(), random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(150):
            altered = bytearray(whole)
            for _ in range(choose.choice([1, 4, 30])):
                altered[choose.randrange(min(len(whole), 700))] = choose.randrange(256)
            path.write_bytes(altered)
            lines = 1
            try:
                read_tensors(path)
            except CheckpointError as error:
                lines = len(str(error).splitlines())
            assert lines == 1


def test_a_missing_file_is_named(tmp_path):
    assert refusal(tmp_path / "dit.pt") == "no such file. Pass a checkpoint, a diffusers directory or 'demo'."


@pytest.fixture
def index(tmp_path):
    for i in range(2):
        save_file({f"layer.{i}": torch.full((2,), float(i))}, tmp_path / f"part-{i}.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    write_index(path, {f"layer.{i}": f"part-{i}.safetensors" for i in range(2)})
    return path


def write_index(path, weight_map):
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_read_together(index):
    assert {name: tensor.tolist() for name, tensor in read_sharded(index).items()} == {
        "layer.0": [0.0, 0.0], "layer.1": [1.0, 1.0]
    }  # fmt: skip


@pytest.mark.parametrize("shard", ["../part-0.safetensors", "/etc/passwd", "sub/part-0.safetensors", "", "."])
def test_a_shard_outside_the_folder_is_refused(index, shard):
    write_index(index, {"layer.0": shard})
    assert refusal(index, read_sharded) == (
        f"shard '{shard}' lies outside its folder, expected a plain file name. Download it again."
    )


def test_a_missing_shard_is_named(index):
    shard = index.parent / "part-1.safetensors"
    shard.unlink()
    with pytest.raises(CheckpointError) as error:
        read_sharded(index)
    assert str(error.value) == f"{shard}: missing, 'model.safetensors.index.json' names it. Download it too."


def test_a_truncated_shard_is_named(index):
    shard = index.parent / "part-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"part-1\.safetensors: damaged or truncated"):
        read_sharded(index)


def test_tensors_that_no_shard_holds_are_named(index):
    write_index(index, {"layer.0": "part-0.safetensors", "layer.7": "part-1.safetensors"})
    assert refusal(index, read_sharded) == "its shards lack 'layer.7'. Download them again."


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map_is_refused(index, text):
    index.write_text(text)
    assert refusal(index, read_sharded) == "no 'weight_map' of tensor names to shards. Download it again."


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100000])
def test_json_that_cannot_be_read_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert refusal(tmp_path / "config.json", read_json).startswith(
        ("not a JSON object", "damaged or truncated (", "empty or truncated")
    )


def test_json_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    assert refusal(tmp_path / "config.json", read_json) == "not a JSON object. Get it again."


def test_devices_and_directories_are_not_checkpoints(tmp_path):
    assert refusal(tmp_path).startswith("no such file")
    assert refusal(Path("/dev/zero")).startswith("no such file")
