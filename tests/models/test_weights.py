"""Weights that stay in their file: what is read of them, and when the whole network is loaded instead."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tqdit.errors import CheckpointError
from tqdit.models import weights
from tqdit.models.loaded import fingerprint
from tqdit.models.weights import IN_MEMORY, Changes, open_network
from zoo.pipelines import FAMILIES

FILE = "diffusion_pytorch_model.safetensors"
NAME = "transformer_blocks.0.ff.net.0.proj.weight"

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers about diffusers
]


@pytest.fixture
def network():
    return FAMILIES["flux"]()[0].transformer.to(torch.bfloat16)


@pytest.fixture
def folder(network, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "LARGE", 64)
    network.save_pretrained(tmp_path)
    return tmp_path


def opened(network, folder):
    return open_network(type(network), folder / FILE, json.loads((folder / "config.json").read_text()))


def changed(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def test_every_parameter_and_view_is_read_as_it_lies_in_the_file(network, folder):
    found, values = opened(network, folder)
    expected = dict(network.named_parameters())
    for name, parameter in found.named_parameters():
        assert parameter.dtype == torch.float32
        assert (parameter in values) == (parameter.numel() >= 64)
        assert torch.equal(values.read(parameter), expected[name].float())
    view = found.get_parameter(NAME)[3:7, 5:].T
    assert torch.equal(values.read(view), expected[NAME].float()[3:7, 5:].T)
    assert fingerprint(found, 0, values) == fingerprint(network, 0)


def test_what_is_in_memory_is_read_from_there():
    tensor = torch.nn.Parameter(torch.ones(3))
    read = IN_MEMORY.read(tensor)
    assert read.data_ptr() == tensor.data_ptr()
    assert not read.requires_grad


def test_a_value_that_is_no_number_is_named_with_its_file(network, folder):
    changed(folder, lambda tensors: tensors[NAME].fill_(torch.inf))
    found, values = opened(network, folder)
    with pytest.raises(CheckpointError, match=rf"{FILE}: '{NAME}' holds NaN or infinite"):
        values.read(found.get_parameter(NAME))


@pytest.mark.parametrize("change", [
    lambda tensors: tensors.pop(NAME),
    lambda tensors: tensors.update(more=torch.zeros(2)),
    lambda tensors: tensors.update({NAME: tensors[NAME][:-1].clone()}),
    lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.int8)}),
])  # fmt: skip
def test_a_file_of_another_layout_is_left_to_diffusers(network, folder, change):
    changed(folder, change)
    assert opened(network, folder) is None


def test_a_pickled_checkpoint_is_left_to_diffusers(network, folder):
    assert open_network(type(network), folder / "diffusion_pytorch_model.bin", {}) is None


def test_a_network_runs_forward_and_backward_on_weights_that_are_lent(network, folder):
    found, values = opened(network, folder)
    linear, expected = found.get_submodule(NAME.removesuffix(".weight")), network.float().get_parameter(NAME)
    kept = []
    x = torch.randn(3, expected.shape[1], requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    with values.lent(), hooks:
        y = linear(x)
        y.sum().backward()
    torch.testing.assert_close(y, x @ expected.T + values.read(linear.bias))
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ expected)
    assert any(tensor in values for tensor in kept)
    assert not any(torch.equal(tensor, expected.T) for tensor in kept)


def test_a_changed_weight_is_made_when_it_is_read(network, folder):
    found, values = opened(network, folder)
    changes, reads = Changes(values), []
    twice = changes.add(found.get_parameter(NAME)[2:5], lambda weight: reads.append(weight) or 2 * weight)
    again = changes.add(twice, lambda weight: weight + 1)
    assert not reads
    expected = 2 * network.get_parameter(NAME).float()[2:5] + 1
    assert torch.equal(changes.weights.read(again[1:]), expected[1:])
    assert twice not in values
    assert torch.equal(changes.add(torch.ones(2), torch.neg), -torch.ones(2))
