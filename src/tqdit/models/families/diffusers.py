"""Adapter for diffusers directories: a transformer, or a whole pipeline. The module is diffusers' own, unconverted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.card import Latents
from tqdit.errors import CheckpointError, UsageError
from tqdit.extras import need
from tqdit.models.loaded import LoadedModel, fingerprint
from tqdit.models.products import Fold, find_products, shift_and_scale
from tqdit.models.state import StateDict, check_layout, read_json, read_number, read_sharded, read_tensors
from tqdit.models.vae import LATENT_SCALE, read_latents
from tqdit.ports import Port, Signature
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.process import Diffusion
from tqdit.sampling.schedule import SamplingSpec

CLASS_NAME = "DiTTransformer2DModel"
CLASS_NAMES = (CLASS_NAME, "Transformer2DModel")  # the second is what old DiT repositories say
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
POSITIONS = "pos_embed.pos_embed"  # a copy of the sine-cosine positions that old files hold

# DiTPipeline's own settings: DDIM, multiples of 1000 // T, guidance 4 on every channel.
STEPS, GUIDANCE = 50, Guidance(4.0)
SAMPLERS = {"DDIMScheduler": "ddim", "DDPMScheduler": "ddpm"}
SCHEDULER = {"prediction_type": "epsilon", "clip_sample": False, "thresholding": False, "set_alpha_to_one": True,
             "rescale_betas_zero_snr": False, "trained_betas": None, "num_train_timesteps": 1000,
             "timestep_spacing": "leading"}  # fmt: skip
ABSENT = {"clip_sample": True, "variance_type": "fixed_small"}  # diffusers' defaults of absent settings


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
    if heads is not None:
        raise UsageError(f"{root}: --heads is for checkpoints that do not tell; {config_file} does. Leave it out.")
    network = _assemble(folder, read_json(config_file))
    vae = root / "vae" if (root / "vae" / "config.json").is_file() else None
    return describe(
        network,
        source,
        read_sampling(root / "scheduler" / "scheduler_config.json"),
        read_latents(vae) if vae else None,
        vae,
    )


def describe(
    network: nn.Module, source: str, sampling: SamplingSpec | None = None, latents: Latents | None = None,
    vae_folder: Path | None = None,
) -> LoadedModel:  # fmt: skip
    """A `DiTTransformer2DModel` of diffusers as the stages take it."""
    config: Any = network.config
    channels, size, null = config.in_channels, config.sample_size, config.num_embeds_ada_norm
    out_channels = channels if config.out_channels is None else config.out_channels
    signature = Signature(
        ports=(
            Port("hidden_states", "state", "float32", (None, channels, size, size)),
            Port("timestep", "time", "int64", (None,)),
            Port("class_labels", "request", "int64", (None,), null=null, values=null + 1),
        ),
        output=(None, out_channels, size, size),
        family=type(network).__name__,
    )
    network = network.eval().requires_grad_(False)
    example = {name: torch.from_numpy(array) for name, array in signature.zeros(2).items()}
    spec = sampling or SamplingSpec(Diffusion(spacing="leading"), "ddim", STEPS)
    if out_channels == 2 * channels:
        values = {name: getattr(spec.process, name) for name in spec.process.__struct_fields__}
        spec = SamplingSpec(Diffusion(**values | {"learned_variance": True}), spec.sampler, spec.steps)
    return LoadedModel(
        network=network,
        signature=signature,
        products=find_products(network, example, _folds(config)),
        sampling=spec,
        guidance=GUIDANCE,
        latents=latents or Latents(LATENT_SCALE),
        origin="diffusers",
        source=source,
        fingerprint=fingerprint(network, sorted(dict(config).items())),
        vae_folder=vae_folder,
    )


def _folds(config: Any) -> dict[str, tuple[Fold, ...]]:
    """Where divisors of inputs fold: adaLN's rows, and the rows of v. Those of q, k and v would have to be one."""
    width = config.num_attention_heads * config.attention_head_dim
    folds: dict[str, tuple[Fold, ...]] = {"proj_out_2": shift_and_scale("proj_out_1", 0, width)}
    for index in range(config.num_layers):
        block = f"transformer_blocks.{index}"
        folds[f"{block}.attn1.to_out.0"] = (Fold(f"{block}.attn1.to_v", 0, width),)
        folds[f"{block}.ff.net.0.proj"] = shift_and_scale(f"{block}.norm1.linear", 3, width)
    return folds


def _assemble(folder: Path, settings: Mapping[str, Any]) -> nn.Module:
    """The network of a configuration with the weights beside it in float32; float32 weights are not copied."""
    if settings.get("_class_name") not in CLASS_NAMES or settings.get("norm_type", "ada_norm_zero") != "ada_norm_zero":
        raise CheckpointError(
            f"{folder / 'config.json'}: '_class_name' is {settings.get('_class_name')!r} with norm_type "
            f"{settings.get('norm_type')!r}, expected '{CLASS_NAME}' with 'ada_norm_zero'. Pass the directory of a DiT."
        )
    for name in ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size",
                 "num_embeds_ada_norm"):  # fmt: skip
        _check_positive(folder / "config.json", settings, name)
    diffusers = need("diffusers", "vae", "loading a diffusers directory")
    accelerate = need("accelerate", "vae", "loading a diffusers directory")
    known = {name: value for name, value in settings.items() if not name.startswith("_")}
    try:
        with accelerate.init_empty_weights(include_buffers=False):
            network: nn.Module = getattr(diffusers, CLASS_NAME).from_config(known)
    except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: diffusers refuses it ({error}). Get it again.") from error
    tensors = _read_weights(folder)
    tensors.pop(POSITIONS, None)
    check_layout(folder, tensors, network.state_dict())
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return network


def read_sampling(path: Path) -> SamplingSpec | None:
    """The scheduler that a pipeline directory names; None if there is none."""
    if not path.is_file():
        return None
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
        process = Diffusion(
            beta_schedule=str(settings.get("beta_schedule", "linear")),
            beta_start=read_number(path, settings, "beta_start", 1e-4),
            beta_end=read_number(path, settings, "beta_end", 0.02),
            spacing="leading",
            steps_offset=int(read_number(path, settings, "steps_offset", 0)),
        )
        return SamplingSpec(process, sampler, STEPS)
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _unsupported(path: Path, name: str, found: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name} is {found!r}; this version samples only with {expected}. Change the scheduler's "
        f"configuration, or pass '{path.parent.parent / 'transformer'}', which has no scheduler."
    )


def _check_positive(path: Path, settings: Mapping[str, Any], name: str) -> None:
    value = settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = repr(value) if name in settings else "missing"
        raise CheckpointError(f"{path}: '{name}' is {found}, expected a positive whole number. Get the file again.")


def _read_weights(folder: Path) -> StateDict:
    for name in WEIGHT_FILES:
        if (folder / f"{name}.index.json").is_file():
            return read_sharded(folder / f"{name}.index.json")
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise CheckpointError(
        f"{folder}: found none of {', '.join(WEIGHT_FILES)} (or their .index.json). Download the weights too."
    )
