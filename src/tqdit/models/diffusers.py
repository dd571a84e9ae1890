"""Adapter for diffusers directories: a `DiTTransformer2DModel` or a whole DiT pipeline.

The weights are renamed into the native module, which computes the same (tests compare with diffusers' own). The copies
of the timestep and label embedders are merged where all blocks hold the same one, as in every converted checkpoint.
diffusers itself is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tqdit.diffusion import SamplingSpec
from tqdit.errors import CheckpointError, UsageError
from tqdit.models.dit import DiTConfig, sine_cosine_positions
from tqdit.models.loaded import LoadedModel, fingerprint
from tqdit.models.origins import DIFFUSERS
from tqdit.models.published import assemble, choose_heads
from tqdit.models.state import StateDict, read_json, read_sharded, read_tensors

CLASS_NAMES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is what old DiT repositories say
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# diffusers name -> native name, of modules outside and inside the blocks
OUTER = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1",
         "proj_out_2": "final_layer.linear"}  # fmt: skip
INNER = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
EMBEDDERS = ("t_embedder.", "y_embedder.")


def matches(source: str) -> bool:
    return Path(source).is_dir()


def load(source: str, heads: int | None = None) -> LoadedModel:
    root = Path(source)
    folder = root / "transformer" if (root / "model_index.json").is_file() else root
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(
            f"{root}: neither 'model_index.json' nor 'config.json' is in it. Pass the directory that diffusers' "
            "save_pretrained wrote."
        )
    settings = read_json(config_file)
    tensors = rename(_read_weights(folder), config_file)
    config = read_config(config_file, settings, tensors, heads)
    tensors["pos_embed"] = sine_cosine_positions(config)
    network = assemble(folder, tensors, config)
    vae = root / "vae" if (root / "vae" / "config.json").is_file() else None
    return LoadedModel(
        network=network,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        height=config.input_size,
        width=config.input_size,
        num_classes=config.num_classes,
        origin=DIFFUSERS.name,
        source=source,
        fingerprint=fingerprint(network, config),
        sampling=read_sampling(root / "scheduler" / "scheduler_config.json"),
        guidance_scale=DIFFUSERS.guidance_scale,
        latent_scale=_latent_scale(vae),
        vae_folder=vae,
    )


def rename(tensors: StateDict, source: Path) -> StateDict:
    """diffusers' names to native ones: q, k and v fused, equal embedder copies merged."""
    native: StateDict = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if name == "pos_embed.pos_embed":
            continue  # a stored copy of the sine-cosine positions
        if module in OUTER:
            native[f"{OUTER[module]}.{leaf}"] = tensor
            continue
        parts = module.split(".", 2)
        if len(parts) == 3 and parts[0] == "transformer_blocks" and parts[2] in INNER:
            native[f"blocks.{parts[1]}.{INNER[parts[2]]}.{leaf}"] = tensor
        elif len(parts) == 3 and parts[2] == "attn1.to_q":
            block = f"{parts[0]}.{parts[1]}"
            thirds = [tensors.get(f"{block}.attn1.to_{part}.{leaf}") for part in "qkv"]
            if any(third is None for third in thirds):
                raise CheckpointError(f"{source.parent}: '{block}.attn1' lacks one of to_q, to_k, to_v ('{leaf}').")
            native[f"blocks.{parts[1]}.attn.qkv.{leaf}"] = torch.cat([t for t in thirds if t is not None])
        elif len(parts) == 3 and parts[2] in ("attn1.to_k", "attn1.to_v"):
            continue  # taken with to_q
        else:
            native[name] = tensor  # unknown: the layout check names it
    return _merge_equal_embedders(native)


def _merge_equal_embedders(tensors: StateDict) -> StateDict:
    """One shared embedder where every block's copy is the same; else the copies stay."""
    copies: dict[str, list[str]] = {}
    for name in tensors:
        parts = name.split(".", 2)
        if parts[0] == "blocks" and parts[2].startswith(EMBEDDERS):
            copies.setdefault(parts[2], []).append(name)
    for names in copies.values():
        if any(not torch.equal(tensors[names[0]], tensors[other]) for other in names[1:]):
            return tensors
    merged = {name: tensor for name, tensor in tensors.items() if not name.split(".", 2)[-1].startswith(EMBEDDERS)}
    return merged | {short: tensors[names[0]] for short, names in copies.items()}


def read_config(path: Path, settings: Mapping[str, Any], tensors: StateDict, heads: int | None) -> DiTConfig:
    """The native configuration of a diffusers `config.json`; what would compute something else is refused."""
    fixed = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_zero",
             "norm_elementwise_affine": False, "upcast_attention": False}  # fmt: skip
    if settings.get("_class_name") not in CLASS_NAMES:
        raise CheckpointError(
            f"{path}: '_class_name' is {settings.get('_class_name')!r}, expected 'DiTTransformer2DModel'. "
            "Pass the directory of a DiT."
        )
    for name, expected in fixed.items():
        if settings.get(name, expected) != expected:
            raise CheckpointError(f"{path}: {name} is {settings[name]!r}; a DiT has {expected!r}. Pass a DiT.")
    try:
        num_heads, head_size = int(settings["num_attention_heads"]), int(settings["attention_head_dim"])
        width, in_channels = num_heads * head_size, int(settings["in_channels"])
        return DiTConfig(
            input_size=int(settings["sample_size"]),
            patch_size=int(settings["patch_size"]),
            in_channels=in_channels,
            out_channels=int(settings.get("out_channels") or in_channels),
            hidden_size=width,
            depth=int(settings["num_layers"]),
            mlp_hidden_size=4 * width,
            num_classes=int(settings["num_embeds_ada_norm"]),
            num_heads=choose_heads(path, width, heads or num_heads),
            frequency_shift=DIFFUSERS.frequency_shift,
            mlp_norm_eps=float(settings.get("norm_eps", DIFFUSERS.mlp_norm_eps)),
            embedders_per_block=any(name.startswith("blocks.0.t_embedder") for name in tensors),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: setting {error} is missing or not a number. Get the file again.") from error


def read_sampling(path: Path) -> SamplingSpec:
    """The scheduler that a pipeline directory names; DiTPipeline's own (DDIM, leading) where there is none."""
    if not path.is_file():
        return DIFFUSERS.sampling
    settings = read_json(path)
    supported = {"prediction_type": "epsilon", "clip_sample": False, "thresholding": False,
                 "set_alpha_to_one": True, "rescale_betas_zero_snr": False, "trained_betas": None,
                 "num_train_timesteps": 1000, "timestep_spacing": "leading"}  # fmt: skip
    for name, expected in supported.items():
        if settings.get(name, expected) != expected:
            raise CheckpointError(
                f"{path}: {name} is {settings[name]!r}; this version samples only with {expected!r}. "
                "Change the scheduler's configuration, or export with --graph denoiser and keep your scheduler."
            )
    try:
        return SamplingSpec(
            steps=DIFFUSERS.sampling.steps,
            sampler="ddpm" if settings.get("_class_name") == "DDPMScheduler" else "ddim",
            spacing="leading",
            steps_offset=int(str(settings.get("steps_offset", 0))),
            beta_schedule=str(settings.get("beta_schedule", "linear")),
            beta_start=float(str(settings.get("beta_start", 1e-4))),
            beta_end=float(str(settings.get("beta_end", 0.02))),
        )
    except (UsageError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _latent_scale(vae: Path | None) -> float:
    if vae is None:
        assert DIFFUSERS.latent_scale is not None
        return DIFFUSERS.latent_scale
    return float(str(read_json(vae / "config.json").get("scaling_factor", DIFFUSERS.latent_scale)))


def _read_weights(folder: Path) -> StateDict:
    for name in WEIGHT_FILES:
        if (folder / f"{name}.index.json").is_file():
            return read_sharded(folder / f"{name}.index.json")
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise CheckpointError(
        f"{folder}: found none of {', '.join(WEIGHT_FILES)} (or their .index.json). Download the weights too."
    )
