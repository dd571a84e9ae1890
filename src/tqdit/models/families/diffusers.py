"""Adapter for diffusers' DiT: a directory of the transformer or of a pipeline, or the module in memory.

The module is diffusers' own, unconverted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tqdit.bounds import MOST_SIDE, check_memory
from tqdit.card import Latents
from tqdit.errors import CheckpointError, UsageError
from tqdit.extras import need
from tqdit.models.directories import class_name, find_weights, transformer_folder, vae_folder
from tqdit.models.folds import Fold, shift_and_scale
from tqdit.models.loaded import LoadedModel, Source, fingerprint, name_of
from tqdit.models.products import find_products
from tqdit.models.state import find_network, load_weights, read_json, read_number, read_tensors, unwrap
from tqdit.models.vae import LATENT_CHANNELS, LATENT_SCALE, read_latents
from tqdit.ports import Port, Signature
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.process import Diffusion
from tqdit.sampling.schedule import SamplingSpec

CLASS_NAME = "DiTTransformer2DModel"
CLASS_NAMES = (CLASS_NAME, "Transformer2DModel")  # the second is what old DiT repositories say
ANCHOR = "pos_embed.proj.weight"  # a tensor that every network of this class has
POSITIONS = "pos_embed.pos_embed"  # a copy of the sine-cosine positions that old files hold

# DiTPipeline's own settings: DDIM, multiples of 1000 // T, guidance 4 on every channel.
STEPS, GUIDANCE = 50, Guidance(4.0)
SAMPLERS = {"DDIMScheduler": "ddim", "DDPMScheduler": "ddpm"}
SCHEDULER = {"prediction_type": "epsilon", "clip_sample": False, "thresholding": False, "set_alpha_to_one": True,
             "rescale_betas_zero_snr": False, "trained_betas": None, "num_train_timesteps": 1000,
             "timestep_spacing": "leading"}  # fmt: skip
ABSENT = {"clip_sample": True, "variance_type": "fixed_small"}  # diffusers' defaults of absent settings


def matches(source: Source) -> bool:
    if isinstance(source, nn.Module):
        return type(unwrap(source, ANCHOR)).__name__ in CLASS_NAMES
    return isinstance(source, str) and Path(source).is_dir() and class_name(source) in (None, *CLASS_NAMES)


def load(source: Source, heads: int | None = None) -> LoadedModel:
    if heads is not None:
        raise UsageError(f"{name_of(source)}: its configuration tells its heads. Leave out the heads.")
    if isinstance(source, nn.Module):
        theirs: Any = unwrap(source, ANCHOR)
        name, settings = name_of(source), {**theirs.config, "_class_name": CLASS_NAME}
        return describe(_fill(name, _make_network(name, settings), theirs.state_dict()), name)
    assert isinstance(source, str)
    root = Path(source)
    folder = transformer_folder(source)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(
            f"{root}: neither 'model_index.json' nor 'config.json' is in it. Pass the directory that diffusers' "
            "save_pretrained wrote."
        )
    settings = read_json(config_file, root)
    tensors = read_tensors(find_weights(folder)[0], root)
    _check_size(config_file, settings, tensors)
    network = _fill(folder, _make_network(config_file, settings), tensors)
    vae = vae_folder(source)
    return describe(
        network,
        source,
        read_sampling(root / "scheduler" / "scheduler_config.json", root),
        read_latents(vae, root) if vae else None,
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
    own = None if channels in (1, 3) else Latents(LATENT_SCALE)
    assumed = {"space": f"its {channels} channels are taken for {'latents' if own else 'pixels'}"}
    return LoadedModel(
        network=network,
        signature=signature,
        products=find_products(network, example, _folds(config)),
        sampling=spec,
        guidance=GUIDANCE,
        latents=latents or own,
        origin="diffusers",
        source=source,
        fingerprint=fingerprint(network, sorted(dict(config).items())),
        vae_folder=vae_folder,
        assumed={} if latents or channels == LATENT_CHANNELS else assumed,
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


def _check_size(where: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a configuration whose network could not have these tensors, before that network is made."""
    layers, most = settings.get("num_layers"), len(tensors)
    if isinstance(layers, int) and layers > most:
        raise CheckpointError(f"{where}: num_layers is {layers}, its weights are {most} tensors. Get it again.")
    largest = max((tensor.numel() for tensor in tensors.values()), default=0)
    for name in ("num_attention_heads", "attention_head_dim", "in_channels", "sample_size", "num_embeds_ada_norm"):
        size = settings.get(name)
        if isinstance(size, int) and size > max(largest, MOST_SIDE):
            raise CheckpointError(f"{where}: {name} is {size}, its largest tensor has {largest} values. Get it again.")
    heads, width, size, patch = (
        settings.get(name) for name in ("num_attention_heads", "attention_head_dim", "sample_size", "patch_size")
    )
    if all(isinstance(each, int) and each > 0 for each in (heads, width, size, patch)):
        positions = 8 * heads * width * (size // patch) ** 2  # type: ignore[operator]
        check_memory(f"{where}: a table of positions", positions, "Get it again.")


def _make_network(where: object, settings: Mapping[str, Any]) -> nn.Module:
    """The network of a configuration, without memory for its weights."""
    if settings.get("_class_name") not in CLASS_NAMES or settings.get("norm_type", "ada_norm_zero") != "ada_norm_zero":
        raise CheckpointError(
            f"{where}: '_class_name' is {settings.get('_class_name')!r} with norm_type {settings.get('norm_type')!r}, "
            f"expected '{CLASS_NAME}' with 'ada_norm_zero'. Pass the directory of a DiT."
        )
    for name in ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size",
                 "num_embeds_ada_norm"):  # fmt: skip
        _check_positive(where, settings, name)
    diffusers = need("diffusers", "vae", "loading a diffusers directory")
    accelerate = need("accelerate", "vae", "loading a diffusers directory")
    known = {name: value for name, value in settings.items() if not name.startswith("_")}
    try:
        with accelerate.init_empty_weights(include_buffers=False):
            network: nn.Module = getattr(diffusers, CLASS_NAME).from_config(known)
    except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: diffusers refuses it ({error}). Get it again.") from error
    return network


def _fill(where: object, network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    found = find_network(where, tensors, ANCHOR)
    found.pop(POSITIONS, None)
    return load_weights(where, network, found)


def read_sampling(path: Path, root: Path) -> SamplingSpec | None:
    """The scheduler that a pipeline directory names; None if there is none."""
    if not path.is_file():
        return None
    settings = read_json(path, root)
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


def _check_positive(where: object, settings: Mapping[str, Any], name: str) -> None:
    value = settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = repr(value) if name in settings else "missing"
        raise CheckpointError(f"{where}: '{name}' is {found}, expected a positive whole number. Get the file again.")
