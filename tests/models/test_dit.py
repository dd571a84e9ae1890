"""The native module: names, positions, frequencies, submodules."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import support
from tqdit.models.dit import DiT, DiTConfig, TimestepEmbedder, sine_cosine_positions

XL_2 = DiTConfig(
    input_size=32, patch_size=2, in_channels=4, out_channels=8, hidden_size=1152, depth=28, mlp_hidden_size=4608,
    num_classes=1000, num_heads=16,
)  # fmt: skip


def published_names(depth):
    """The keys of a state dict of facebookresearch/DiT."""
    names = {"pos_embed", "y_embedder.embedding_table.weight"}
    modules = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    modules += ["final_layer.adaLN_modulation.1"]
    inside = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    modules += [f"blocks.{block}.{module}" for block in range(depth) for module in inside]
    return names | {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}


def meta(config):
    with torch.device("meta"):
        return DiT(config)


@pytest.mark.parametrize("depth", [1, 2, 28])
def test_parameter_names_are_exactly_the_published_ones(depth):
    assert set(meta(replace(support.TINY, depth=depth)).state_dict()) == published_names(depth)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "patch", "millions"),
    [(1152, 28, 16, 2, 675), (1024, 24, 16, 2, 458), (768, 12, 12, 2, 130), (384, 12, 6, 2, 33), (384, 12, 6, 8, 33)],
    ids=["XL/2", "L/2", "B/2", "S/2", "S/8"],
)
def test_the_family_has_the_published_sizes(width, depth, heads, patch, millions):
    config = replace(XL_2, hidden_size=width, depth=depth, num_heads=heads, mlp_hidden_size=4 * width, patch_size=patch)
    assert sum(p.numel() for p in meta(config).parameters()) / 1e6 == pytest.approx(millions, abs=0.6)


@pytest.mark.slow
def test_xl_2_has_the_published_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in meta(XL_2).state_dict().items()}
    assert shapes["blocks.27.adaLN_modulation.1.weight"] == (6912, 1152)
    assert shapes["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert shapes["final_layer.linear.weight"] == (32, 1152)
    assert shapes["pos_embed"] == (1, 256, 1152)
    assert round(sum(p.numel() for p in meta(XL_2).parameters()) / 1e6, 2) == 675.13


@pytest.mark.parametrize(("width", "size", "patch"), [(16, 8, 2), (384, 32, 8), (1152, 32, 2)])
def test_positions_equal_those_of_diffusers(width, size, patch):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    ours = sine_cosine_positions(replace(support.TINY, hidden_size=width, input_size=size, patch_size=patch))
    side = size // patch
    torch.testing.assert_close(ours[0], get_2d_sincos_pos_embed(width, side, base_size=side).float(), atol=1e-6, rtol=0)


def test_positions_are_columns_first_then_rows():
    positions = sine_cosine_positions(support.TINY)[0].reshape(4, 4, 16)
    assert torch.equal(positions[0, 2, :8], positions[3, 2, :8])  # the same column
    assert torch.equal(positions[2, 0, 8:], positions[2, 3, 8:])  # the same row
    assert positions[0, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 4 + [1.0] * 4


def embedding(timestep):
    embedder = TimestepEmbedder(support.TINY)
    embedder.mlp = nn.Identity()
    return embedder(torch.tensor([timestep]))[0]


def test_timestep_frequencies_are_powers_of_ten_thousand():
    frequencies = TimestepEmbedder(support.TINY).frequencies
    expected = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    torch.testing.assert_close(frequencies.double(), expected, rtol=1e-6, atol=0)


def test_the_timestep_embedding_equals_that_of_diffusers_with_the_published_frequencies():
    from diffusers.models.embeddings import get_timestep_embedding

    expected = get_timestep_embedding(torch.tensor([999]), 256, flip_sin_to_cos=True, downscale_freq_shift=0)[0]
    assert torch.equal(embedding(999), expected)


def test_every_quantizable_tensor_is_the_input_or_output_of_a_submodule(network):
    seen = {}
    for name, module in network.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs, output)}))
    with torch.no_grad():
        network(torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor([1]))
    for block in range(2):
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.act", "mlp.fc2", "adaLN_modulation.1"):
            assert f"blocks.{block}.{part}" in seen
        (q, k), scores = seen[f"blocks.{block}.attn.scores"]
        (softmax_input,), probabilities = seen[f"blocks.{block}.attn.softmax"]
        (left, v), _ = seen[f"blocks.{block}.attn.value_product"]
        assert q.shape == k.shape == v.shape == (1, 2, 16, 8)
        assert softmax_input is scores
        assert left is probabilities
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(1, 2, 16))


def test_rows_of_a_batch_do_not_influence_each_other(network):
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 5, 2])
    with torch.no_grad():
        together = network(x, t, y)
        alone = torch.cat([network(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_unpatchify_inverts_the_order_of_patches():
    config = replace(support.TINY, out_channels=4)
    image = torch.randn(2, 4, 8, 8)
    tokens = image.reshape(2, 4, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 16)  # (N, T, p * p * C)
    assert torch.equal(meta(config).unpatchify(tokens), image)
