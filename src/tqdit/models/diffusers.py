"""Adapter for diffusers directories: a `DiTTransformer2DModel` or a whole DiT pipeline.

The weights are renamed into the native module, which computes the same (tests compare with diffusers' own). The copies
of the timestep and label embedders are merged where all blocks hold the same one, as in every converted checkpoint.
diffusers itself is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tqdit.diffusion import SamplerName, SamplingSpec
from tqdit.errors import CheckpointError, UsageError
from tqdit.models.dit import DiTConfig, sine_cosine_positions
from tqdit.models.loaded import LoadedModel, fingerprint
from tqdit.models.origins import DIFFUSERS
from tqdit.models.published import assemble, choose_heads
from tqdit.models.state import StateDict, read_json, read_sharded, read_tensors

CLASS_NAMES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is what old DiT repositories say
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# Schedulers whose step is one of ours. A stock DiTPipeline ignores the learned variance, so a DDPMScheduler that asks
# for another one would sample otherwise than we do.
SAMPLERS: dict[str, SamplerName] = {"DDIMScheduler": "ddim", "DDPMScheduler": "ddpm"}
SCHEDULER = {"prediction_type": "epsilon", "clip_sample": False, "thresholding": False, "set_alpha_to_one": True,
             "rescale_betas_zero_snr": False, "trained_betas": None, "num_train_timesteps": 1000,
             "timestep_spacing": "leading"}  # fmt: skip
ABSENT = {"clip_sample": True, "variance_type": "fixed_small"}  # what diffusers takes where a setting is absent

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
BLOCKS = "transformer_blocks"
UNKNOWN = "unknown:"  # keeps a name that diffusers' DiT does not have from passing for a native one


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
    tensors = rename(_read_weights(folder), folder)
    config = read_config(config_file, settings, tensors, heads)
    tensors["pos_embed"] = sine_cosine_positions(config)
    network = assemble(folder, tensors, config, spell)
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
        group, number, inner = [*module.split(".", 2), "", ""][:3]
        if name == "pos_embed.pos_embed":
            continue  # a stored copy of the sine-cosine positions
        if module in OUTER:
            native[f"{OUTER[module]}.{leaf}"] = tensor
        elif group == BLOCKS and inner in INNER:
            native[f"blocks.{number}.{INNER[inner]}.{leaf}"] = tensor
        elif group == BLOCKS and inner == "attn1.to_q":
            native[f"blocks.{number}.attn.qkv.{leaf}"] = _fuse(tensors, f"{group}.{number}.attn1", leaf, source)
        elif group != BLOCKS or inner not in ("attn1.to_k", "attn1.to_v"):  # those are taken with to_q
            native[UNKNOWN + name] = tensor  # the layout check names it
    return _merge_equal_embedders(native)


def spell(name: str) -> str:
    """A native name as the file has it, for messages."""
    if name.startswith(UNKNOWN):
        return name.removeprefix(UNKNOWN)
    module, _, leaf = name.rpartition(".")
    outer = {native: theirs for theirs, native in OUTER.items()}
    inner = {native: theirs for theirs, native in INNER.items()} | {"attn.qkv": "attn1.to_q"}
    group, number, rest = [*module.split(".", 2), "", ""][:3]
    if module in outer:
        return f"{outer[module]}.{leaf}"
    if group == "blocks" and rest in inner:
        return f"{BLOCKS}.{number}.{inner[rest]}.{leaf}"
    return f"{BLOCKS}.0.{inner[module]}.{leaf}" if module in inner else name  # a merged embedder


def _fuse(tensors: StateDict, attention: str, leaf: str, source: Path) -> Tensor:
    names = [f"{attention}.to_{part}.{leaf}" for part in "qkv"]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise CheckpointError(f"{source}: missing '{missing[0]}' beside '{names[0]}'. Download the weights again.")
    shapes = [tuple(tensors[name].shape) for name in names]
    if len(set(shapes)) > 1:
        raise CheckpointError(
            f"{source}: '{attention}' has q, k and v ('{leaf}') of shapes {', '.join(map(str, shapes))}, expected "
            "equal ones. The checkpoint is inconsistent; get it again."
        )
    return torch.cat([tensors[name] for name in names])


def _merge_equal_embedders(tensors: StateDict) -> StateDict:
    """One shared embedder where every block's copy is the same; else the copies stay."""
    copies: dict[str, list[str]] = {}
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    for name in tensors:
        parts = name.split(".", 2)
        if parts[0] == "blocks" and parts[2].startswith(EMBEDDERS):
            copies.setdefault(parts[2], []).append(name)
    for names in copies.values():
        if len(names) < len(blocks) or any(not torch.equal(tensors[names[0]], tensors[other]) for other in names[1:]):
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
    size = partial(_positive, path, settings)
    num_heads, in_channels = size("num_attention_heads"), size("in_channels")
    width = num_heads * size("attention_head_dim")
    return DiTConfig(
        input_size=size("sample_size"),
        patch_size=size("patch_size"),
        in_channels=in_channels,
        out_channels=in_channels if settings.get("out_channels") is None else size("out_channels"),
        hidden_size=width,
        depth=size("num_layers"),
        mlp_hidden_size=4 * width,
        num_classes=size("num_embeds_ada_norm"),
        num_heads=choose_heads(path, width, num_heads if heads is None else heads),
        frequency_shift=DIFFUSERS.frequency_shift,
        mlp_norm_eps=_number(path, settings, "norm_eps", DIFFUSERS.mlp_norm_eps),
        embedders_per_block=any(name.startswith("blocks.0.t_embedder") for name in tensors),
    )


def read_sampling(path: Path) -> SamplingSpec:
    """The scheduler that a pipeline directory names; DiTPipeline's own (DDIM, leading) where there is none."""
    if not path.is_file():
        return DIFFUSERS.sampling
    settings = read_json(path)
    sampler = SAMPLERS.get(str(settings.get("_class_name")))
    if sampler is None:
        raise _unsupported(path, "_class_name", settings.get("_class_name"), " or ".join(map(repr, SAMPLERS)))
    needed = SCHEDULER | ({"variance_type": "learned_range"} if sampler == "ddpm" else {})
    for name, expected in needed.items():
        found = settings.get(name, ABSENT.get(name, expected))
        if found != expected:
            raise _unsupported(path, name, found, repr(expected))
    try:
        return SamplingSpec(
            steps=DIFFUSERS.sampling.steps,
            sampler=sampler,
            spacing="leading",
            steps_offset=int(_number(path, settings, "steps_offset", 0)),
            beta_schedule=str(settings.get("beta_schedule", "linear")),
            beta_start=_number(path, settings, "beta_start", 1e-4),
            beta_end=_number(path, settings, "beta_end", 0.02),
        )
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _unsupported(path: Path, name: str, found: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name} is {found!r}; this version samples only with {expected}. Change the scheduler's "
        f"configuration, or pass '{path.parent.parent / 'transformer'}' with --graph denoiser and keep your scheduler."
    )


def _latent_scale(vae: Path | None) -> float:
    assert DIFFUSERS.latent_scale is not None
    if vae is None:
        return DIFFUSERS.latent_scale
    return _number(vae / "config.json", read_json(vae / "config.json"), "scaling_factor", DIFFUSERS.latent_scale)


def _positive(path: Path, settings: Mapping[str, Any], name: str) -> int:
    value = settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = repr(value) if name in settings else "missing"
        raise CheckpointError(f"{path}: '{name}' is {found}, expected a positive whole number. Get the file again.")
    return value


def _number(path: Path, settings: Mapping[str, Any], name: str, default: float) -> float:
    value = settings.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise CheckpointError(f"{path}: '{name}' is {value!r}, expected a number. Get the file again.")
    return value


def _read_weights(folder: Path) -> StateDict:
    for name in WEIGHT_FILES:
        if (folder / f"{name}.index.json").is_file():
            return read_sharded(folder / f"{name}.index.json")
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise CheckpointError(
        f"{folder}: found none of {', '.join(WEIGHT_FILES)} (or their .index.json). Download the weights too."
    )
