"""Networks and state dicts in memory: the same model as from a file, and nothing of the caller's changes."""

import copy

import pytest
import torch
from torch import nn

import support
from tqdit.errors import CheckpointError, UsageError
from tqdit.models.dit import DiT, LabelEmbedder
from tqdit.models.load import load_model
from tqdit.models.model_card import ModelCard

pytestmark = pytest.mark.slow

CARD = ModelCard(num_classes=5)


class Wrapped(nn.Module):
    """As a training library wraps a network, with its average beside it."""

    def __init__(self, network):
        super().__init__()
        self.model = network
        self.ema = copy.deepcopy(network)


class Theirs(DiT):
    """The same function in another class, as the published code has it."""


class Doubled(DiT):
    """The names of a DiT, and another function."""

    def forward(self, x, timestep, class_labels=None):
        return 2 * super().forward(x, timestep, class_labels)


class Dropping(LabelEmbedder):
    """As the published code drops labels in training."""

    def forward(self, labels):
        return super().forward(torch.full_like(labels, 5) if self.training else labels)


def in_another_class(network):
    other = Theirs(support.TINY)
    other.load_state_dict(network.state_dict())
    other.num_heads = 2
    return other


@pytest.fixture
def from_file(checkpoint):
    return load_model(checkpoint, heads=2)


def test_a_state_dict_gives_the_model_of_its_file(network, from_file):
    model = load_model(network.state_dict(), 2, CARD)
    assert (model.fingerprint, model.signature, model.source) == (
        from_file.fingerprint, from_file.signature, "state dict in memory"
    )  # fmt: skip


@pytest.mark.parametrize("wrap", [lambda network: network, in_another_class, Wrapped, torch.compile, nn.DataParallel])
def test_a_network_in_whatever_wrapper_gives_the_model_of_its_file(wrap, network, from_file):
    network.num_heads = 2
    model = load_model(wrap(network), card=CARD)
    assert (model.fingerprint, model.signature, model.products) == (
        from_file.fingerprint, from_file.signature, from_file.products
    )  # fmt: skip


def test_the_callers_network_stays_as_it_is_and_its_weights_are_not_copied(network):
    network = in_another_class(network)
    network.y_embedder = Dropping(5, 16)
    network.requires_grad_(True).train()
    network.blocks[0].eval()
    names = [name for name, _ in network.named_modules()]
    modes = {module: module.training for module in network.modules()}
    model = load_model(network, 2, CARD)
    assert [name for name, _ in network.named_modules()] == names
    assert {module: module.training for module in network.modules()} == modes
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    weight = network.blocks[1].mlp.fc1.weight
    assert model.network.blocks[1].mlp.fc1.weight.data_ptr() == weight.data_ptr()


def test_a_network_in_bfloat16_is_computed_in_float32(network):
    network = in_another_class(network)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    model = load_model(network, 2, CARD)
    assert all(tensor.dtype == torch.float32 for tensor in model.network.state_dict().values())
    assert torch.equal(model.network.blocks[0].attn.qkv.weight, network.blocks[0].attn.qkv.weight.float())


def test_a_network_that_computes_something_else_is_refused(network):
    other = Doubled(support.TINY)
    other.load_state_dict(network.state_dict())
    with pytest.raises(CheckpointError, match=r"Doubled in memory: .* its prediction is 100\.0% off"):
        load_model(other, 2, CARD)
    other.forward = lambda x: x
    with pytest.raises(CheckpointError, match=r"cannot be called with \(x, timestep, class_labels\)"):
        load_model(other, 2, CARD)


def test_a_diffusers_module_gives_the_model_of_its_directory(theirs, diffusers_folder):
    names = [name for name, _ in theirs.named_modules()]
    model, from_folder = load_model(theirs), load_model(diffusers_folder)
    assert (model.fingerprint, model.signature, model.products, model.sampling, model.origin) == (
        from_folder.fingerprint, from_folder.signature, from_folder.products, from_folder.sampling, "diffusers"
    )  # fmt: skip
    assert [name for name, _ in theirs.named_modules()] == names
    assert load_model(nn.DataParallel(theirs)).fingerprint == model.fingerprint


def test_weights_that_were_merged_into_a_module_are_those_of_the_model(theirs):
    before = load_model(theirs).fingerprint
    with torch.no_grad():
        theirs.transformer_blocks[0].attn1.to_q.weight += torch.outer(torch.ones(16), torch.ones(16))  # rank 1
    model = load_model(theirs)
    assert model.fingerprint != before
    expected = theirs.transformer_blocks[0].attn1.to_q.weight
    assert torch.equal(model.network.transformer_blocks[0].attn1.to_q.weight, expected)


@pytest.mark.parametrize("source", [{}, {"a": torch.ones(2)}])
def test_a_state_dict_of_something_else_is_refused_as_no_dit(source):
    with pytest.raises(CheckpointError, match="in memory: not a DiT in the published layout: missing 'x_embedder"):
        load_model(source)


def test_another_network_is_refused_with_the_way_to_load_it():
    with pytest.raises(UsageError, match=r"Linear in memory: a Linear\. .*tqdit\.record"):
        load_model(nn.Linear(2, 2))


def test_what_is_no_model_at_all_is_refused():
    with pytest.raises(UsageError, match="list in memory: not a model"):
        load_model([1, 2])
