"""Checkpoints in the layout of facebookresearch/DiT: what is inferred, what is refused, and that nothing is copied."""

import argparse
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import support
from tqdit.card import Latents
from tqdit.errors import CheckpointError
from tqdit.models.dit import DiT, randomize
from tqdit.models.load import load_model
from tqdit.models.model_card import ModelCard
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.process import Diffusion
from tqdit.sampling.schedule import SamplingSpec

CARD = ModelCard(num_classes=5)
SAMPLING = SamplingSpec(Diffusion(learned_variance=True), "ddpm", 250)


def shared_state_dict(config):
    """Random non-zero weights of any size, all of them views of one storage: a full-size file stays small."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DiT(config).state_dict().items()}
    storage = torch.randn(max(shape.numel() for shape in shapes.values()), generator=torch.Generator().manual_seed(0))
    storage = 0.02 * storage + 0.001
    return {name: storage[: shape.numel()].view(shape) for name, shape in shapes.items()}


S_8 = replace(support.TINY, input_size=32, patch_size=8, hidden_size=384, depth=12, mlp_hidden_size=1536,
              num_classes=1000, num_heads=6)  # fmt: skip
XL_2 = replace(support.TINY, input_size=32, patch_size=2, hidden_size=1152, depth=28, mlp_hidden_size=4608,
               num_classes=1000, num_heads=16)  # fmt: skip


def nested(tensors):
    """As DiT's train.py saves it."""
    other = {name: torch.zeros_like(tensor[:1]) for name, tensor in list(tensors.items())[:3]}
    args = argparse.Namespace(model="DiT-S/8", image_size=256, lr=1e-4)
    return {"model": other, "ema": tensors, "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "args": args}


def outputs(network, size=8, classes=5):
    x = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network(x, torch.tensor([0, 999]), torch.tensor([1, classes]))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_dit_s_8_loads(suffix, tmp_path):
    tensors, path = shared_state_dict(S_8), tmp_path / f"dit.{suffix}"
    if suffix == "pt":
        torch.save(tensors, path)
    else:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    model = load_model(str(path))
    state = model.network.state_dict()
    assert model.network.config == S_8
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert outputs(model.network, 32, 1000).std() > 0


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FORMS = {
    "flat": lambda tensors, path: torch.save(tensors, path),
    "under ema": lambda tensors, path: torch.save(nested(tensors), path),
    "under model": lambda tensors, path: torch.save({"model": tensors, "epoch": 3}, path),
    "from before zip archives": lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "safetensors": lambda tensors, path: save_file(tensors, path.with_suffix(".safetensors")),
}


@pytest.mark.parametrize(("dtype", "form"), support.few(  # each form and each type
    [(dtype, form) for dtype in DTYPES for form in FORMS],
    *((torch.float32, form) for form in FORMS), *((dtype, "flat") for dtype in DTYPES[1:]),
))  # fmt: skip
def test_every_form_of_file_gives_the_same_float32_weights(form, dtype, tmp_path, network):
    tensors = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
    FORMS[form](tensors, tmp_path / "dit.pt")
    (file,) = tmp_path.iterdir()
    loaded = load_model(str(file), 2, CARD).network
    assert loaded.config == support.TINY
    assert not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors[name].float())


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "millions"), [(2, 53.6), pytest.param(28, 675.13, marks=pytest.mark.full)])
def test_dit_xl_2_of_full_size_loads_without_a_copy_of_its_weights(tmp_path, depth, millions):
    path, config = tmp_path / "DiT-XL-2-256x256.pt", replace(XL_2, depth=depth)
    torch.save(nested(shared_state_dict(config)), path)
    model = load_model(str(path))
    parameters = list(model.network.parameters())
    assert model.network.config == config
    assert round(sum(p.numel() for p in parameters) / 1e6, 2) == millions
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == 1
    assert all(p.abs().max() > 0 for p in parameters)
    assert (model.signature.state.row_shape, model.signature.output_shape) == ((4, 32, 32), (8, 32, 32))
    assert (model.signature.label.choices, model.latents) == (1000, Latents(0.18215))


def test_a_published_checkpoint_samples_as_its_origin(checkpoint):
    model = load_model(str(checkpoint), heads=2)
    assert (model.origin, model.sampling, model.guidance) == ("published", SAMPLING, Guidance(1.5, channels=3))


def in_published_names(theirs):
    """The weights of diffusers' module whose blocks hold equal embedders."""
    theirs_to_ours = {
        "pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
    }  # fmt: skip
    parts = {"norm1.linear": "adaLN_modulation.1", "attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1",
             "ff.net.2": "mlp.fc2"}  # fmt: skip
    for block in range(2):
        for part, ours in parts.items():
            theirs_to_ours[f"transformer_blocks.{block}.{part}"] = f"blocks.{block}.{ours}"
    state = theirs.state_dict()
    tensors = {"pos_embed": theirs.pos_embed.pos_embed}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if module in theirs_to_ours:
            tensors[f"{theirs_to_ours[module]}.{leaf}"] = tensor
    for block in range(2):
        for leaf in ("weight", "bias"):
            parts = [state[f"transformer_blocks.{block}.attn1.to_{part}.{leaf}"] for part in "qkv"]
            tensors[f"blocks.{block}.attn.qkv.{leaf}"] = torch.cat(parts)
    return tensors


def test_the_published_network_equals_diffusers_module_after_undoing_their_differences(theirs, tmp_path):
    """An independent implementation of the same arithmetic: diffusers' blocks with DiT's frequencies and epsilon."""
    first = theirs.transformer_blocks[0].norm1.emb
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    path = tmp_path / "published.pt"
    torch.save(in_published_names(theirs), path)
    published = load_model(str(path), 2, CARD).network
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([0, 1, 500, 999]), torch.tensor([0, 5, 2, 3])
    with torch.no_grad():
        torch.testing.assert_close(published(x, t, y), theirs(x, t, y).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_fingerprint_is_that_of_the_weights_not_of_the_file(checkpoint, own_file, tmp_path, network):
    flat = load_model(str(checkpoint), heads=2).fingerprint
    torch.save(nested(dict(network.state_dict())), tmp_path / "nested.pt")
    assert load_model(str(own_file)).fingerprint == flat
    assert load_model(str(tmp_path / "nested.pt"), 2, CARD).fingerprint == flat


@pytest.mark.slow
def test_the_fingerprint_tells_weights_and_heads_apart(checkpoint, tmp_path):
    torch.save(randomize(DiT(support.TINY), seed=1, scale=0.3).state_dict(), tmp_path / "other.pt")
    prints = {load_model(str(path), heads, CARD).fingerprint for path, heads in (
        (checkpoint, 2), (checkpoint, 4), (tmp_path / "other.pt", 2)
    )}  # fmt: skip
    assert len(prints) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_the_heads_of_the_published_family_are_known(width, heads, tmp_path):
    config = replace(support.TINY, hidden_size=width, mlp_hidden_size=4 * width, depth=1)
    torch.save(shared_state_dict(config), tmp_path / "dit.pt")
    assert load_model(str(tmp_path / "dit.pt"), card=CARD).network.config.num_heads == heads


def test_other_widths_need_heads(checkpoint):
    with pytest.raises(CheckpointError) as error:
        load_model(str(checkpoint))
    assert str(error.value) == (
        f"{checkpoint}: width 16 is not of the published family [384, 768, 1024, 1152], so the number of heads is not "
        "known. Pass --heads, or tell 'heads' in a model card."
    )
    assert load_model(str(checkpoint), heads=4).network.config.num_heads == 4


@pytest.mark.parametrize("heads", [0, -2, 3, 32])
def test_heads_that_do_not_divide_the_width_are_refused(checkpoint, heads):
    with pytest.raises(CheckpointError) as error:
        load_model(str(checkpoint), heads=heads)
    assert str(error.value) == (f"{checkpoint}: width 16 cannot be split into {heads} heads. Correct the heads.")


def change(checkpoint, edit):
    tensors = torch.load(checkpoint, weights_only=True)
    edit(tensors)
    torch.save(dict(tensors), checkpoint)
    with pytest.raises(CheckpointError) as error:
        load_model(str(checkpoint), heads=2)
    text = str(error.value)
    assert text.startswith(f"{checkpoint}: ")
    assert "\n" not in text
    return text.removeprefix(f"{checkpoint}: ")


def test_a_wrong_layout_is_named_by_its_missing_and_unexpected_keys(checkpoint):
    def edit(tensors):
        tensors["blocks.1.attn.q.weight"] = tensors.pop("blocks.1.attn.qkv.weight")
        tensors["extra"] = torch.zeros(1)

    said = change(checkpoint, edit)
    assert "missing 'blocks.1.attn.qkv.weight'; unexpected 'blocks.1.attn.q.weight', 'extra'" in said


def test_a_long_list_of_keys_is_cut(checkpoint):
    parts = ("blocks.1.attn", "blocks.1.mlp")
    text = change(checkpoint, lambda tensors: [tensors.pop(k) for k in list(tensors) if k.startswith(parts)])
    assert "missing 'blocks.1.attn.proj.bias', " in text
    assert " and 2 more. " in text


def test_another_kind_of_model_is_named_by_a_missing_and_some_unexpected_keys(tmp_path):
    path = tmp_path / "resnet.pt"
    torch.save({"conv1.weight": torch.ones(2), "fc.bias": torch.ones(2)}, path)
    with pytest.raises(CheckpointError) as error:
        load_model(str(path))
    assert str(error.value) == (
        f"{path}: not a DiT in the published layout: missing 'x_embedder.proj.weight'; it holds 2 tensors, among them "
        "unexpected 'conv1.weight', 'fc.bias'. Pass a published DiT checkpoint or a diffusers DiTTransformer2DModel "
        "directory."
    )


def test_a_block_that_is_missing_in_the_middle_is_named(checkpoint):
    def edit(tensors):
        for name in [name for name in tensors if name.startswith("blocks.1.")]:
            tensors[name.replace("blocks.1.", "blocks.2.")] = tensors.pop(name)

    assert "missing 'blocks.1.adaLN_modulation.1.bias'" in change(checkpoint, edit)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_not_finite_are_refused(checkpoint, value, dtype):
    def edit(tensors):
        tensors["blocks.0.mlp.fc1.weight"] = tensors["blocks.0.mlp.fc1.weight"].to(dtype)
        tensors["blocks.0.mlp.fc1.weight"][3, 3] = value

    assert change(checkpoint, edit) == "'blocks.0.mlp.fc1.weight' holds NaN or infinite values. Use another checkpoint."


@pytest.mark.slow
def test_large_finite_weights_whose_sum_overflows_are_not_refused(tmp_path, network):
    tensors = {name: tensor.half() for name, tensor in network.state_dict().items()}
    tensors["blocks.0.mlp.fc1.weight"] = torch.full((64, 16), 60000.0, dtype=torch.float16)
    torch.save(tensors, tmp_path / "large.pt")
    assert load_model(str(tmp_path / "large.pt"), 2, CARD).network.blocks[0].mlp.fc1.weight.max() == 60000


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_not_plain_floats_are_refused(checkpoint, dtype):
    name = "blocks.0.attn.proj.weight"
    text = change(checkpoint, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert text == (
        f"'{name}' holds {dtype}, expected float16, bfloat16, float32 or float64. Pass the checkpoint from before it "
        "was quantized."
    )


INCONSISTENT = {
    "a block of other width": (
        {"blocks.1.attn.proj.weight": (8, 16)},
        "'blocks.1.attn.proj.weight' has shape (8, 16), expected (16, 16) from the other tensors. "
        "The checkpoint is inconsistent; get it again.",
    ),
    "a patch that is not square": ({"x_embedder.proj.weight": (16, 4, 2, 3)}, "'x_embedder.proj.weight' has shape"),
    "a matrix where a filter stands": (
        {"x_embedder.proj.weight": (16, 16)},
        "'x_embedder.proj.weight' has 2 dimensions, a DiT's has 4. Pass a DiT checkpoint.",
    ),
    "an empty filter": (
        {"x_embedder.proj.weight": (16, 4, 0, 0)},
        "'x_embedder.proj.weight' of shape (16, 4, 0, 0) is empty. Pass a DiT checkpoint.",
    ),
    "tokens that make no square": (
        {"pos_embed": (1, 15, 16)},
        "15 tokens, 32 outputs per token of 2x2 pixels and 256 timestep frequencies are not a DiT's; expected a square "
        "number, a multiple of 4 and 256. Pass a DiT checkpoint.",
    ),
    "another number of frequencies": ({"t_embedder.mlp.0.weight": (16, 128)}, "and 128 timestep frequencies"),
    "another number of output channels": (
        {"final_layer.linear.weight": (20, 16)},
        "5 channels come out of 4, expected 4 or 8. Pass a DiT checkpoint.",
    ),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_inconsistent_shapes_are_refused(checkpoint, case):
    shapes, message = INCONSISTENT[case]
    text = change(checkpoint, lambda tensors: tensors.update({k: torch.ones(v) for k, v in shapes.items()}))
    assert message in text


def test_a_width_that_has_no_positions_is_refused(tmp_path):
    tensors = shared_state_dict(support.TINY)
    torch.save(tensors | {"x_embedder.proj.weight": torch.ones(18, 4, 2, 2)}, tmp_path / "dit.pt")
    with pytest.raises(CheckpointError, match=r"width 18 is not a multiple of 4, which its positions need\. Pass"):
        load_model(str(tmp_path / "dit.pt"), heads=2)
