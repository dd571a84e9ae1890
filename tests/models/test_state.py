"""Reading files that somebody else wrote: nothing runs, nothing half-read gets through, one line says why."""

import argparse
import json
import os
import pickle
import random
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tqdit.errors import CheckpointError
from tqdit.models.state import find_network, flatten, read_json, read_tensors

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
    assert find_network(path, read_tensors(path), "layer.0").keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({}, "an empty dict"),
        ([1, 2], "list"),
        (torch.zeros(2), "Tensor"),
        ({0: torch.zeros(1)}, "a dict with keys '0'"),
        ({"ema": {"decay": 0.999}}, "a dict with keys 'ema'"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content, found):
    torch.save(content, tmp_path / "dit.pt")
    assert refusal(tmp_path / "dit.pt") == (
        f"expected a state dict of tensors, flat or in sections, found {found}. Pass a DiT checkpoint."
    )


OTHER = {name: tensor + 100 for name, tensor in TENSORS.items()}
SECTIONS = {
    "flat": TENSORS,
    "a parallel wrapper": {f"module.{name}": tensor for name, tensor in TENSORS.items()},
    "a compiled network in one": {f"module._orig_mod.{name}": tensor for name, tensor in TENSORS.items()},
    "a training module": {"state_dict": {f"model.{name}": tensor for name, tensor in TENSORS.items()}, "epoch": 3},
    "with a decoder": {f"model.net.{name}": t for name, t in TENSORS.items()} | {"vae.conv.weight": torch.ones(2)},
    "averaged beside others": {"model": OTHER, "ema": TENSORS, "opt": {"state": {0: {"step": torch.ones(1)}}}},
    "averaged in a wrapper": {
        "model_ema": {f"module.{name}": tensor for name, tensor in TENSORS.items()},
        "net": OTHER,
    },
    "averaged among flat names": {f"ema.{n}": t for n, t in TENSORS.items()}
    | {f"model.{n}": t for n, t in OTHER.items()},
    "one dict twice": {"model": TENSORS, "state_dict": TENSORS},
}


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_network_is_found_under_sections_and_prefixes(name, suffix, tmp_path):
    path = tmp_path / f"dit.{suffix}"
    if suffix == "pt":
        torch.save(SECTIONS[name], path)
    else:
        save_file({name: tensor.clone() for name, tensor in flatten(SECTIONS[name]).items()}, path)
    found = find_network(path, read_tensors(path), "layer.0")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], TENSORS[key]) for key in TENSORS)


def test_two_networks_without_averaged_ones_are_refused_by_name(tmp_path):
    torch.save({"student": TENSORS, "teacher": OTHER}, tmp_path / "dit.pt")
    with pytest.raises(CheckpointError, match=r"several networks, under 'student\.', 'teacher\.'"):
        find_network(tmp_path / "dit.pt", read_tensors(tmp_path / "dit.pt"), "layer.0")


def test_a_dict_that_holds_itself_is_read_once(tmp_path):
    content = {"ema": TENSORS}
    content |= {f"again {i}": content for i in range(100)}
    content["ema"] = TENSORS | {"deeper": content}
    torch.save(content, tmp_path / "dit.pt")
    assert len(read_tensors(tmp_path / "dit.pt")) == len(TENSORS)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    torch.save(TENSORS, tmp_path / "stored.pt")
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored:
        entries = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(tmp_path / "dit.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, content in entries.items():
            bomb.writestr(name, content + b"\0" * 10**6)
    assert refusal(tmp_path / "dit.pt").startswith("a compressed archive, which torch.save never writes.")


@pytest.mark.parametrize("shell", [
    torch.zeros(1).expand(10**9), torch.zeros(10**9, device="meta"),
    torch.sparse_coo_tensor(size=(10**9,), check_invariants=False),
])  # fmt: skip
def test_a_tensor_that_claims_more_values_than_it_holds_is_refused(shell):
    with pytest.raises(CheckpointError, match=r"x\.pt: 'layer\.9' claims \(1000000000,\) values and holds fewer"):
        find_network("x.pt", TENSORS | {"layer.9": shell}, "layer.0")


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
    assert refusal(tmp_path / "dit.pt").startswith("no such file")


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
    assert {name: tensor.tolist() for name, tensor in read_tensors(index).items()} == {
        "layer.0": [0.0, 0.0], "layer.1": [1.0, 1.0]
    }  # fmt: skip


@pytest.mark.parametrize(
    "shard", ["../part-0.safetensors", "/etc/passwd", "sub/part-0.safetensors", "", ".", "model.safetensors.index.json"]
)
def test_a_shard_outside_the_folder_is_refused(index, shard):
    write_index(index, {"layer.0": shard})
    assert refusal(index) == (f"shard '{shard}' is not a file of weights in its folder. Download it again.")


def test_a_shard_behind_a_link_out_of_the_folder_is_refused(index, tmp_path):
    shard = index.parent / "part-1.safetensors"
    secret = shard.rename(tmp_path.parent / f"{tmp_path.name}-secret.safetensors")
    shard.symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"part-1\.safetensors: a link to '.*secret\.safetensors', outside"):
        read_tensors(index)


def test_a_sharded_checkpoint_in_the_cache_of_a_model_hub_is_read(index, tmp_path):
    (blobs := tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    (snapshot := tmp_path / "models--a--b" / "snapshots" / "0a1b").mkdir(parents=True)
    for file in (index, *tmp_path.glob("*.safetensors")):
        file.rename(blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    assert read_tensors(snapshot / index.name).keys() == {"layer.0", "layer.1"}


def test_a_link_that_the_user_names_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "new.pt").rename(tmp_path / "elsewhere" / "blob")
    (tmp_path / "dit.pt").symlink_to(tmp_path / "elsewhere" / "blob")
    assert read_tensors(tmp_path / "dit.pt").keys() == TENSORS.keys()


def test_a_missing_shard_is_named(index):
    shard = index.parent / "part-1.safetensors"
    shard.unlink()
    with pytest.raises(CheckpointError) as error:
        read_tensors(index)
    assert str(error.value) == f"{shard}: missing, 'model.safetensors.index.json' names it. Download it too."


def test_a_truncated_shard_is_named(index):
    shard = index.parent / "part-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"part-1\.safetensors: damaged or truncated"):
        read_tensors(index)


def test_tensors_that_no_shard_holds_are_named(index):
    write_index(index, {"layer.0": "part-0.safetensors", "layer.7": "part-1.safetensors"})
    assert refusal(index) == "its shards lack 'layer.7'. Download them again."


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map_is_refused(index, text):
    index.write_text(text)
    assert refusal(index) == "no 'weight_map' of tensor names to shards. Download it again."


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


TWO = torch.ones(2)


@pytest.mark.parametrize(("section", "name"), [
    ({"ema": {"shadow_params": [TWO], "decay": 0.9}}, "ema.shadow_params.0"), ({"ema": [TWO]}, "ema.0"),
    ({"model_ema": (TWO,)}, "model_ema.0"), ({"ema": {"params": [TWO]}}, "ema.params.0"),
    ({"ema": [{"params": [TWO]}]}, "ema.0.params.0"), ({"shadow_params": {0: TWO}}, "shadow_params.0"),
    ({"ema": {0: TWO, "decay": 0.9}}, "ema.0"),  # numbers beside names
    ({"ema": {"decay": 0.9, "params": TWO}}, "ema.params"),  # one vector of all
    ({"model_ema": {"xy": TWO, "decay": torch.tensor(0.9)}}, "model_ema.xy"),  # the dots left out
    ({"optimizer_states": [{"ema": (TWO,)}]}, "optimizer_states.0.ema.0"),
    ({"swa": [TWO]}, "swa.0"), ({"model_avg": [TWO]}, "model_avg.0"),
])  # fmt: skip
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_averaged_weights_without_names_are_refused_since_the_others_would_be_taken(tmp_path, section, name, suffix):
    content, file = {"model": {"x.y": torch.zeros(2)}, **section}, tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save(content, file)
    else:
        save_file({key: tensor.clone() for key, tensor in flatten(content).items()}, file)
    with pytest.raises(CheckpointError, match=rf"a\{suffix}: .*'{name}'.*without the names"):
        find_network(file, read_tensors(file), "x.y")


def test_averaged_weights_in_memory_are_taken_from_modules_and_arrays():
    module, weights = torch.nn.Linear(2, 1), {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}
    arrays = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    for section in (module, arrays):
        found = find_network("here", flatten({"model": weights, "ema": section}), "weight")
        assert torch.equal(found["weight"], module.weight)


def test_schedules_of_averages_are_no_weights():
    content = {"model": {"x": TWO}, "ema_schedule": [[0, 0.9], [9, 0.99]], "ema": [{}], "n_averaged": torch.tensor(3)}
    assert find_network("here", flatten(content), "x").keys() == {"x"}


def test_the_state_of_an_optimizer_is_no_averaged_weights(tmp_path):
    state = {"step": torch.ones(1), "exp_avg": TWO, "exp_avg_sq": TWO, "square_avg": TWO}
    optimizer = {"state": {0: state}, "param_groups": [{"lr": 1.0}]}
    torch.save({"model": {"x": torch.zeros(2)}, "opt": optimizer}, tmp_path / "a.pt")
    assert find_network("a.pt", read_tensors(tmp_path / "a.pt"), "x").keys() == {"x"}
    torch.save({"model": {"x": torch.zeros(2)}, "ema": {"x": TWO, "decay": 0.9}, "opt": optimizer}, tmp_path / "a.pt")
    assert torch.equal(find_network("a.pt", read_tensors(tmp_path / "a.pt"), "x")["x"], TWO)
