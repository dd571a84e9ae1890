"""diffusers directories: diffusers' own module, in every form that save_pretrained writes, with attention explicit."""

import copy
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support import few, normal_rows
from tqdit.card import Latents
from tqdit.errors import CheckpointError, UsageError
from tqdit.models.families.diffusers import describe
from tqdit.models.load import load_model
from tqdit.models.model_card import ModelCard
from tqdit.sampling.chains import Chains, run
from tqdit.sampling.noise import INITIAL
from tqdit.sampling.process import Diffusion
from tqdit.sampling.schedule import SamplingSpec

WEIGHTS = "diffusion_pytorch_model.safetensors"
SAMPLING = SamplingSpec(Diffusion(spacing="leading", learned_variance=True), "ddim", 50)


def make(**settings):
    from diffusers import DiTTransformer2DModel

    from tqdit.models.dit import randomize

    defaults = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8,
                "num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 5}  # fmt: skip
    model = DiTTransformer2DModel(**(defaults | settings))
    scale = 4.8 / model.inner_dim  # outputs of about 1: larger weights would only amplify rounding
    return randomize(model, scale=scale).eval()


def assert_same_outputs(theirs, model):
    """The network of a loaded model against diffusers' module, which computes attention in one function."""
    size, classes = theirs.config.sample_size, theirs.config.num_embeds_ada_norm
    timesteps = torch.tensor([0, 1, 20, 500, 998, 999])
    labels = torch.tensor([0, 1, classes - 1, classes, classes, 0])  # `classes` is the null class
    x = torch.randn(6, theirs.config.in_channels, size, size, generator=torch.Generator().manual_seed(1))
    assert not any("sdpa" in name for name, _ in theirs.named_modules())
    with torch.no_grad():
        expected = theirs(x, timesteps, labels).sample
        found = model.call({"hidden_states": x, "timestep": timesteps, "class_labels": labels})
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1


SIZES = {
    "two blocks": {},
    "one block": {"num_layers": 1},
    "one head": {"num_attention_heads": 1, "attention_head_dim": 16},
    "four blocks, pixels": {"num_layers": 4, "in_channels": 3, "out_channels": 6, "sample_size": 12},
    "no learned variance": {"out_channels": None},
    "five channels out": {"out_channels": 5},
    "large patches": {"patch_size": 8, "sample_size": 16},
    "an odd number of tokens": {"patch_size": 4, "sample_size": 12},
    "wider": {"num_attention_heads": 4, "attention_head_dim": 16, "sample_size": 32},
    "another epsilon": {"norm_eps": 1e-2},
    "no bias of q, k and v": {"attention_bias": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_explicit_attention_computes_what_diffusers_does(size, tmp_path):
    theirs = make(**SIZES[size])
    theirs.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), card=ModelCard(space="pixels" if theirs.config.in_channels == 3 else "latents"))
    assert type(model.network) is type(theirs)
    assert_same_outputs(theirs, model)
    assert model.sampling.process.learned_variance == (theirs.config.out_channels == 2 * theirs.config.in_channels)
    names = [product.name for product in model.products]
    for block in range(theirs.config.num_layers):
        for part in ("to_q", "to_k", "to_v", "sdpa.scores", "sdpa.value_product", "to_out.0"):
            assert names.count(f"transformer_blocks.{block}.attn1.{part}") == 1


@pytest.mark.slow
def test_products_are_placed_by_what_they_multiply(theirs):
    products = {product.name: product for product in describe(theirs, "tiny").products}
    assert {name for name, product in products.items() if product.place == "patch"} == {"pos_embed.proj"}
    assert {name for name, product in products.items() if product.place == "final"} == {"proj_out_2"}
    conditioning = {name for name, product in products.items() if product.place == "conditioning"}
    assert "proj_out_1" in conditioning
    assert len(conditioning) == 3 * 2 + 1  # two linear layers of the embedder and adaLN's, per block
    made_by = {name: product.made_by for name, product in products.items() if product.made_by}
    assert made_by == {
        f"transformer_blocks.{block}.{part}": maker
        for block in range(2)
        for part, maker in (("ff.net.2", "gelu"), ("attn1.sdpa.value_product", "softmax"))
    }


def test_a_copy_of_the_network_keeps_its_attention_explicit(theirs):
    model = describe(theirs, "tiny")
    copied = replace(model, network=copy.deepcopy(model.network))
    seen = []
    scores = copied.network.get_submodule("transformer_blocks.1.attn1.sdpa.scores")
    scores.register_forward_hook(lambda *_: seen.append(1))
    rows = {name: torch.from_numpy(array) for name, array in model.signature.zeros(2).items()}
    with torch.no_grad():
        assert torch.equal(copied.call(rows), model.call(rows))
    assert seen == [1]


@pytest.mark.slow
def test_sampling_equals_diffusers_pipeline(tmp_path, monkeypatch):
    """DDIM from the same noise: the latents before the decoder. The pipeline's null class is always 1000."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    theirs = make(num_embeds_ada_norm=1000)
    theirs.save_pretrained(tmp_path / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    model = load_model(str(tmp_path))
    noise = normal_rows(7, np.arange(3), INITIAL, (4, 8, 8))
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, **__: torch.from_numpy(noise))
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2)
    pipeline = DiTPipeline(theirs, vae, DDIMScheduler.from_pretrained(tmp_path / "scheduler"))
    pipeline.set_progress_bar_config(disable=True)
    decoded = []
    monkeypatch.setattr(vae, "decode", lambda latents, **_: (decoded.append(latents), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        pipeline([3, 700, 999], guidance_scale=4.0, num_inference_steps=20)
    expected = decoded[0].numpy() * vae.config.scaling_factor
    chains = Chains(model.signature, model.guidance, 3)
    for image, label in enumerate((3, 700, 999)):
        chains.add(model.sampling.choose(20).schedule, {"class_labels": np.int64(label)}, 4.0, 7, image)
    np.testing.assert_allclose(run(chains, model), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
def test_every_form_of_weights_gives_the_same_model(theirs, diffusers_folder, tmp_path, form):
    sharded = {"max_shard_size": "20KB"} if form.startswith("sharded") else {}
    theirs.save_pretrained(tmp_path / "other", safe_serialization=form.endswith("safetensors"), **sharded)
    files = [file.name for file in (tmp_path / "other").iterdir()]
    assert (len(files) > 3) == bool(sharded)
    assert any(name.endswith(form.split()[-1]) for name in files)
    model = load_model(str(tmp_path / "other"))
    assert_same_outputs(theirs, model)
    assert model.fingerprint == load_model(str(diffusers_folder)).fingerprint


@pytest.mark.slow
@pytest.mark.parametrize(("form", "variant"), few(
    itertools.product(["safetensors", "bin", "sharded safetensors"], ["fp16", "bf16", "non_ema"]),
    ("safetensors", "fp16"), ("bin", "non_ema"), ("sharded safetensors", "bf16"),
))  # fmt: skip
def test_weights_saved_as_a_variant_are_found(theirs, diffusers_folder, tmp_path, form, variant):
    sharded = {"max_shard_size": "20KB"} if form.startswith("sharded") else {}
    folder = tmp_path / "other"
    theirs.save_pretrained(folder, variant=variant, safe_serialization=form.endswith("safetensors"), **sharded)
    assert all(f".{variant}" in file.name for file in folder.iterdir() if file.name != "config.json")
    assert load_model(folder).fingerprint == load_model(diffusers_folder).fingerprint


@pytest.mark.slow
def test_weights_without_a_variant_go_first_and_two_variants_are_refused(theirs, diffusers_folder):
    fingerprint = load_model(diffusers_folder).fingerprint
    copy.deepcopy(theirs).half().save_pretrained(diffusers_folder, variant="fp16")
    assert load_model(diffusers_folder).fingerprint == fingerprint
    (diffusers_folder / WEIGHTS).rename(diffusers_folder / "diffusion_pytorch_model.ema.safetensors")
    with pytest.raises(CheckpointError, match="holds the variants ema, fp16, expected one"):
        load_model(diffusers_folder)


def hub_cache(folder, root):
    """What a download of `folder` looks like in the cache of a model hub: its snapshot."""
    (blobs := root / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot = root / "models--a--b" / "snapshots" / "0a1b"
    for number, file in enumerate(sorted(file for file in folder.rglob("*") if file.is_file())):
        shutil.copy(file, blobs / f"{number:040x}")
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../" * (len(link.relative_to(snapshot).parts) + 1), "blobs", f"{number:040x}"))
    return snapshot


@pytest.mark.slow
def test_a_pipeline_in_the_cache_of_a_model_hub_loads(pipeline, tmp_path):
    snapshot = hub_cache(pipeline, tmp_path / "hub")
    assert (snapshot / "transformer" / WEIGHTS).is_symlink()
    assert load_model(snapshot).fingerprint == load_model(pipeline).fingerprint
    assert load_model(snapshot / "transformer").fingerprint == load_model(pipeline).fingerprint


@pytest.mark.parametrize(
    "name", [f"transformer/{WEIGHTS}", "transformer/config.json", "scheduler/scheduler_config.json", "transformer"]
)
def test_a_link_out_of_the_directory_is_refused(pipeline, tmp_path, name):
    target = (pipeline / name).rename(tmp_path / "secret")
    (pipeline / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=r": a link to '.*secret.*', outside '.*pipeline'\. Refused"):
        load_model(pipeline)
    (pipeline / name).unlink()
    target.rename(pipeline / "inside")
    (pipeline / name).symlink_to(pipeline / "inside")
    assert load_model(pipeline).origin == "diffusers"


def test_a_directory_that_is_a_link_loads(diffusers_folder, tmp_path):
    (tmp_path / "mine").symlink_to(diffusers_folder)
    assert load_model(tmp_path / "mine").origin == "diffusers"


def test_half_precision_weights_are_computed_in_float32(theirs, tmp_path):
    halves = {name: tensor.half() for name, tensor in theirs.state_dict().items()}
    copy.deepcopy(theirs).half().save_pretrained(tmp_path)
    theirs.load_state_dict(halves)  # rounded, in float32
    assert_same_outputs(theirs, load_model(str(tmp_path)))


def edit_config(folder, **changes):
    file = folder / "config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in settings.items() if value != "absent"}))


@pytest.mark.slow
def test_the_old_class_name_loads_as_well(theirs, diffusers_folder):
    edit_config(diffusers_folder, _class_name="Transformer2DModel", _diffusers_version="0.12.0.dev0")
    assert_same_outputs(theirs, load_model(str(diffusers_folder)))


def test_a_stored_copy_of_the_positions_is_ignored(theirs, diffusers_folder):
    tensors = load_file(diffusers_folder / WEIGHTS)
    save_file(tensors | {"pos_embed.pos_embed": torch.zeros(1, 16, 16)}, diffusers_folder / WEIGHTS)
    assert_same_outputs(theirs, load_model(str(diffusers_folder)))


@pytest.fixture
def pipeline(diffusers_folder, tmp_path):
    """A whole DiTPipeline directory, as facebook/DiT-XL-2-256 has it."""
    from diffusers import DDIMScheduler

    root = tmp_path / "pipeline"
    shutil.copytree(diffusers_folder, root / "transformer")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    DDIMScheduler(clip_sample=False).save_pretrained(root / "scheduler")
    return root


def test_a_pipeline_directory_loads_with_its_scheduler(theirs, pipeline):
    model = load_model(str(pipeline))
    assert_same_outputs(theirs, model)
    assert model.sampling == SAMPLING
    assert (model.origin, model.guidance.scale, model.latents) == ("diffusers", 4.0, Latents(0.18215))
    assert (model.signature.state.row_shape, model.signature.output_shape) == ((4, 8, 8), (8, 8, 8))
    assert (model.signature.label.choices, model.signature.label.null) == (5, 5)
    assert model.vae_folder is None


def test_a_bare_transformer_samples_as_the_stock_pipeline(diffusers_folder):
    model = load_model(str(diffusers_folder))
    assert model.sampling == SAMPLING
    assert (model.sampling.sampler, model.sampling.steps, model.guidance.channels) == ("ddim", 50, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "latents"),
    [
        ({"scaling_factor": 0.5}, Latents(0.5)),
        ({"scaling_factor": 0.5, "shift_factor": None}, Latents(0.5)),
        ({"scaling_factor": 1.5, "shift_factor": 0.06}, Latents(1.5, 0.06)),
        ({}, Latents(0.18215)),
    ],
)
def test_the_decoder_of_a_pipeline_says_how_latents_relate_to_codes(pipeline, settings, latents):
    (pipeline / "vae").mkdir()
    (pipeline / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"} | settings))
    model = load_model(str(pipeline))
    assert (model.latents, model.vae_folder) == (latents, pipeline / "vae")


def edit_scheduler(root, **changes):
    file = root / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in settings.items() if value != "absent"}))


@pytest.mark.slow
def test_the_schedule_of_a_pipeline_is_its_own(pipeline):
    edit_scheduler(pipeline, beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.012, steps_offset=1)
    assert load_model(str(pipeline)).sampling.process == Diffusion(
        "scaled_linear", 0.001, 0.012, spacing="leading", steps_offset=1, learned_variance=True
    )


@pytest.mark.slow
def test_a_ddpm_scheduler_with_learned_variance_is_ours(pipeline):
    edit_scheduler(pipeline, _class_name="DDPMScheduler", variance_type="learned_range")
    assert load_model(str(pipeline)).sampling == replace(SAMPLING, sampler="ddpm")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"prediction_type": "v_prediction"},
            "prediction_type is 'v_prediction'; this version samples only with 'epsilon'",
        ),
        ({"timestep_spacing": "trailing"}, "timestep_spacing is 'trailing'; this version samples only with 'leading'"),
        ({"clip_sample": True}, "clip_sample is True; this version samples only with False"),
        ({"clip_sample": "absent"}, "clip_sample is True; this version samples only with False"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one is False; this version samples only with True"),
        ({"num_train_timesteps": 500}, "num_train_timesteps is 500; this version samples only with 1000"),
        ({"trained_betas": [0.1]}, "trained_betas is [0.1]; this version samples only with None"),
        (
            {"_class_name": "DPMSolverMultistepScheduler"},
            "_class_name is 'DPMSolverMultistepScheduler'; this version samples only with 'DDIMScheduler' or "
            "'DDPMScheduler'",
        ),
        (
            {"_class_name": "DDPMScheduler"},
            "variance_type is 'fixed_small'; this version samples only with 'learned_range'",
        ),
    ],
)
def test_a_scheduler_that_samples_otherwise_is_refused_with_a_way_out(pipeline, changes, found):
    edit_scheduler(pipeline, **changes)
    with pytest.raises(CheckpointError) as error:
        load_model(str(pipeline))
    assert str(error.value) == (
        f"{pipeline / 'scheduler' / 'scheduler_config.json'}: {found}. Change the scheduler's configuration, or pass "
        f"'{pipeline / 'transformer'}', which has no scheduler."
    )
    assert load_model(str(pipeline / "transformer")).sampling == SAMPLING


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "unknown beta schedule 'squaredcos_cap_v2'"),
        ({"beta_start": "0.1"}, "'beta_start' is '0.1', expected a number. Get the file again."),
        ({"beta_end": 2}, "betas from 0.0001 to 2 with steps_offset 0; expected 0 < beta_start <= beta_end < 1"),
        ({"steps_offset": -1}, "betas from 0.0001 to 0.02 with steps_offset -1; expected"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(pipeline, changes, message):
    edit_scheduler(pipeline, **changes)
    with pytest.raises(CheckpointError) as error:
        load_model(str(pipeline))
    assert f"scheduler_config.json: {message}" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "absent"},
            "'_class_name' is None with norm_type 'ada_norm_zero', expected 'DiTTransformer2DModel' with "
            "'ada_norm_zero'. Pass the directory of a DiT.",
        ),
        ({"norm_type": "ada_norm_single"}, "norm_type 'ada_norm_single', expected 'DiTTransformer2DModel'"),
        ({"num_layers": "absent"}, "'num_layers' is missing, expected a positive whole number. Get the file again."),
        ({"patch_size": 0}, "'patch_size' is 0, expected a positive whole number"),
        ({"sample_size": [8, 8]}, "'sample_size' is [8, 8], expected a positive whole number"),
        ({"in_channels": True}, "'in_channels' is True, expected a positive whole number"),
        ({"num_embeds_ada_norm": None}, "'num_embeds_ada_norm' is None, expected a positive whole number"),
        ({"num_attention_heads": 3}, "'pos_embed.proj.bias' has shape (16,), expected (24,)"),
        ({"num_embeds_ada_norm": 7}, "class_embedder.embedding_table.weight' has shape (6, 16), expected (8, 16)"),
        ({"num_layers": 3}, "missing 'transformer_blocks.2."),
        ({"num_layers": 1}, "unexpected 'transformer_blocks.1."),
        ({"num_layers": 1_000_000}, "num_layers is 1000000, its weights are "),  # which would take minutes to make
        ({"attention_head_dim": 100_000_000}, "attention_head_dim is 100000000, its largest tensor has "),
    ],
)
def test_a_configuration_that_is_not_a_dits_is_refused(diffusers_folder, changes, message):
    edit_config(diffusers_folder, **changes)
    with pytest.raises(CheckpointError) as error:
        load_model(str(diffusers_folder))
    assert message in str(error.value)
    assert str(error.value).startswith(str(diffusers_folder))
    assert "\n" not in str(error.value)


def test_a_table_of_positions_beyond_memory_is_refused_before_it_is_made(diffusers_folder):
    edit_config(diffusers_folder, sample_size=16384, patch_size=1, num_attention_heads=16384)
    with pytest.raises(UsageError, match=r"config\.json: a table of positions: .* of memory are needed"):
        load_model(str(diffusers_folder))


def test_another_class_is_told_how_its_inputs_are_learned(diffusers_folder):
    edit_config(diffusers_folder, _class_name="PixArtTransformer2DModel")
    with pytest.raises(UsageError, match=r"a PixArtTransformer2DModel\..*--prompts.*--rows.*tqdit\.record"):
        load_model(str(diffusers_folder))


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError) as error:
        load_model(str(folder))
    return str(error.value).removeprefix(f"{folder}: ")


FC2 = "transformer_blocks.0.ff.net.2.weight"
QUERY = "transformer_blocks.1.attn1.to_q.bias"


def test_a_wrong_layout_is_named_in_the_names_of_the_file(diffusers_folder):
    def edit(tensors):
        tensors["transformer_blocks.0.ff.net.3.weight"] = tensors.pop(FC2)

    assert change(diffusers_folder, edit) == (
        f"its tensors are not those of its network: missing '{FC2}'; unexpected "
        "'transformer_blocks.0.ff.net.3.weight'. Pass a published DiT checkpoint or a diffusers "
        "DiTTransformer2DModel directory."
    )


def test_published_names_do_not_pass_for_those_of_diffusers(diffusers_folder):
    text = change(diffusers_folder, lambda tensors: tensors.update({"blocks.0.mlp.fc2.weight": tensors.pop(FC2)}))
    assert f"missing '{FC2}'; unexpected 'blocks.0.mlp.fc2.weight'" in text


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_missing_part_of_the_attention_is_named(diffusers_folder, part):
    name = f"transformer_blocks.1.attn1.to_{part}.bias"
    assert f"missing '{name}'" in change(diffusers_folder, lambda tensors: tensors.pop(name))


def test_a_part_of_the_attention_of_another_shape_is_refused(diffusers_folder):
    text = change(diffusers_folder, lambda tensors: tensors.update({QUERY: torch.zeros(8)}))
    assert text == (
        f"'{QUERY}' has shape (8,), expected (16,) from the other tensors. The checkpoint is inconsistent; get it "
        "again."
    )


def test_weights_that_are_not_finite_are_named_as_in_the_file(diffusers_folder):
    text = change(diffusers_folder, lambda tensors: tensors[FC2].fill_(float("nan")))
    assert text == f"'{FC2}' holds NaN or infinite values. Use another checkpoint."


def test_a_directory_that_is_not_diffusers_is_refused(tmp_path):
    with pytest.raises(CheckpointError) as error:
        load_model(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path}: neither 'model_index.json' nor 'config.json' is in it. Pass the directory that diffusers' "
        "save_pretrained wrote."
    )


def test_a_directory_without_weights_is_refused(diffusers_folder):
    (diffusers_folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError) as error:
        load_model(str(diffusers_folder))
    assert str(error.value) == (
        f"{diffusers_folder}: found none of diffusion_pytorch_model.safetensors, diffusion_pytorch_model.bin (or their "
        ".index.json). Download the weights too."
    )


@pytest.mark.parametrize("text", ["", "{", "\x00", "[1]", "[" * 100000])
def test_a_damaged_configuration_is_one_line(diffusers_folder, text):
    (diffusers_folder / "config.json").write_text(text)
    with pytest.raises(
        CheckpointError,
        match=r"config\.json: (not a JSON|(damaged|empty) or truncated).* Get it again",
    ):
        load_model(str(diffusers_folder))


def test_a_number_of_latent_scale_is_required(pipeline):
    (pipeline / "vae").mkdir()
    (pipeline / "vae" / "config.json").write_text('{"scaling_factor": null}')
    with pytest.raises(
        CheckpointError, match=r"vae/config\.json: 'scaling_factor' is None, expected a number\. Get the"
    ):
        load_model(str(pipeline))
