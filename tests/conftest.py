"""Fixtures that more than one folder of tests uses; the models themselves stand in `support.py`."""

import json

import pytest
import torch
from safetensors.torch import save_file

import kernel_device  # noqa: F401 (before anything imports Triton)
import support
from tqdit.models.dit import DiT, randomize


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test sees the same numbers whichever tests run before it."""
    torch.manual_seed(0)


@pytest.fixture
def network():
    """A tiny DiT in the published layout: two blocks of width 16, random non-zero weights."""
    return randomize(DiT(support.TINY), scale=0.3).eval()


@pytest.fixture
def checkpoint(tmp_path, network):
    """Its weights as a flat `.pt`; of unusual width, so it needs `heads=2`."""
    path = tmp_path / "tiny.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def own_file(tmp_path, network):
    """Its weights as a safetensors file of ours, which says how many heads it has."""
    path = tmp_path / "tiny.safetensors"
    save_file(network.state_dict(), path, {"tqdit": json.dumps({"num_heads": 2})})
    return path


@pytest.fixture
def theirs():
    """The tiny model as diffusers' own module, random non-zero weights, embedders that differ between the blocks."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5,
    )  # fmt: skip
    return randomize(model, scale=0.3).eval()


@pytest.fixture
def diffusers_folder(tmp_path, theirs):
    """What diffusers' save_pretrained writes for it."""
    theirs.save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"
