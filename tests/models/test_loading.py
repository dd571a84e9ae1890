"""`load_model`: which adapter answers, and what it says when none does."""

import pytest
import torch

from tqdit.errors import CheckpointError
from tqdit.models import families
from tqdit.models.families import demo, diffusers, published
from tqdit.models.load import load_model
from tqdit.models.loaded import fingerprint
from tqdit.registry import find_modules


def adapters(source):
    return [one for one in find_modules(families).values() if one.matches(str(source))]


def refusal(source):
    with pytest.raises(CheckpointError) as error:
        load_model(str(source), heads=2)
    return str(error.value)


@pytest.mark.slow
def test_demo_is_the_model_that_ships_with_the_package():
    model = load_model("demo")
    assert (model.origin, model.source, model.latents) == ("demo", "demo", None)
    assert (model.signature.channels, model.sampling.process.learned_variance) == (3, True)
    assert model.signature.label.choices == len(model.class_names) >= 10
    assert model.signature.state.row_shape == (3, 16, 16)
    assert model.network.config.depth >= 6
    assert load_model("demo").fingerprint == model.fingerprint


@pytest.mark.slow
def test_the_demo_takes_its_heads_from_its_file_unless_told_otherwise():
    heads = load_model("demo").network.config.num_heads
    assert load_model("demo", heads=2 * heads).network.config.num_heads == 2 * heads


@pytest.mark.parametrize(
    ("source", "adapter"),
    [
        ("demo", demo),
        ("dit.pt", published),
        ("dit.pth", published),
        ("dit.bin", published),
        ("x.safetensors", published),
    ],
)
def test_each_source_has_one_adapter(source, adapter):
    assert adapters(source) == [adapter]


def test_a_directory_is_diffusers_whatever_its_name(tmp_path):
    folder = tmp_path / "dit.pt"
    folder.mkdir()
    assert adapters(folder) == [diffusers]


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors"])
def test_a_missing_checkpoint_is_named(tmp_path, name):
    path = tmp_path / name
    assert refusal(path) == f"{path}: no such file. Pass a checkpoint, a diffusers directory or 'demo'."


def test_a_missing_directory_is_named(tmp_path):
    path = tmp_path / "missing"
    assert refusal(path) == (
        f"{path}: no such file or directory. Pass 'demo', 'text', a DiT checkpoint (.pt, .safetensors) or a diffusers "
        "directory."
    )


@pytest.mark.parametrize(
    ("name", "suffix"), [("model.onnx", ".onnx"), ("model.gguf", ".gguf"), ("model", "without a suffix")]
)
def test_another_kind_of_file_where_a_model_is_expected_is_refused(tmp_path, name, suffix):
    (tmp_path / name).write_bytes(b"\x08\x08")
    assert refusal(tmp_path / name) == (
        f"{tmp_path / name}: unsupported file type '{suffix}'. Pass 'demo', 'text', a DiT checkpoint (.pt, "
        ".safetensors) or a diffusers directory."
    )


def test_an_onnx_file_named_like_a_checkpoint_is_refused(tmp_path):
    path = tmp_path / "dit.pt"
    path.write_bytes(b"\x08\x08\x12\x07pytorch" + b"\x00" * 100)
    assert refusal(path) == f"{path}: not a PyTorch checkpoint. Get it again."


def test_a_loaded_model_is_in_eval_mode_and_needs_no_gradient(checkpoint):
    network = load_model(str(checkpoint), heads=2).network
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_fingerprint_does_not_depend_on_the_type_or_the_layout_of_storage(network):
    before = fingerprint(network, "configuration")
    weight = network.blocks[0].mlp.fc1.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    assert fingerprint(network, "configuration") == before
    assert fingerprint(network.double(), "configuration") == before
    assert fingerprint(network, "another configuration") != before


def test_one_changed_weight_changes_the_fingerprint(network):
    before = fingerprint(network, None)
    with torch.no_grad():
        network.final_layer.linear.bias[3] += 1e-6
    assert fingerprint(network, None) != before


@pytest.mark.slow
def test_a_new_kind_of_model_is_one_file_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(
        "from dataclasses import replace\n"
        "from tqdit.models.families import demo\n"
        "def matches(source): return source == 'toy:1'\n"
        "def load(source, heads=None): return replace(demo.load('demo', 4), source=f'{source} {heads}', assumed={})\n"
    )
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    assert load_model("toy:1", heads=3).source == "toy:1 3"
    assert list(find_modules(families)) == ["demo", "diffusers", "published", "recorded", "toy"]
