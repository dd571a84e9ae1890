"""The decoder of a diffusers `AutoencoderKL` as an ONNX graph: latents float[B,C,h,w] -> image float[B,3,H,W]."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from tqdit.card import Latents
from tqdit.errors import CheckpointError, TqditWarning
from tqdit.exporter.trace import EXAMPLE_BATCH, trace
from tqdit.extras import need
from tqdit.models.families.diffusers import find_weights
from tqdit.models.loaded import LoadedModel
from tqdit.models.state import check_places, read_json
from tqdit.models.vae import read_latents


class Decoder(nn.Module):
    """From states to codes (`Latents`), then decode. forward(*inputs) takes one, as `trace` calls it."""

    def __init__(self, vae: Any, latents: Latents) -> None:
        super().__init__()
        self.vae, self.latents = vae, latents

    def forward(self, *inputs: Tensor) -> Tensor:
        (states,) = inputs
        codes = states / self.latents.scale
        return self.vae.decode(codes + self.latents.shift if self.latents.shift else codes, return_dict=False)[0]


def check_decoder(folder: Path) -> dict[str, object]:
    """The configuration of a diffusers VAE directory. Refuses any other folder, which needs no model to be loaded."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{folder}: no config.json in it. Pass the directory of a diffusers AutoencoderKL.")
    config = read_json(config_file)
    if config.get("_class_name") != "AutoencoderKL":
        raise CheckpointError(
            f"{config_file}: '_class_name' is {config.get('_class_name')!r}, expected 'AutoencoderKL'."
        )
    return config


def load_decoder(folder: Path, model: LoadedModel) -> Decoder:
    """The decoder in a diffusers VAE directory; refuses one that does not fit the model.

    Its `latents` are those of the VAE's configuration: a model that is exported with it takes them over. Warns if they
    are not what the model tells or takes for granted.
    """
    if model.latents is None:
        raise CheckpointError(
            f'{folder}: {model.source} works on images and needs no decoder. Leave out --vae, or say "space": '
            '"latents" in its model card.'
        )
    root = Path(model.source) if folder == model.vae_folder else folder  # which links must not leave
    check_places(folder, root)
    config = check_decoder(folder)
    if config.get("latent_channels") != model.signature.channels:
        raise CheckpointError(
            f"{folder / 'config.json'}: latent_channels is {config.get('latent_channels')}, the model has "
            f"{model.signature.channels}. Pass the VAE that the model was trained with."
        )
    diffusers = need("diffusers", "vae", "exporting a VAE decoder")
    try:
        vae = diffusers.AutoencoderKL.from_pretrained(
            folder, local_files_only=True, torch_dtype=torch.float32, variant=find_weights(folder)[1]
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: its weights cannot be loaded ({reason}). Get the directory again.") from error
    latents = read_latents(folder, root)
    if latents != model.latents:
        warnings.warn(
            f"{folder}: its latents have scale {latents.scale:g} and shift {latents.shift:g}, those of {model.source} "
            f"{model.latents.scale:g} and {model.latents.shift:g}. The decoder's are taken; if that is right, say so "
            "in the model card.",
            TqditWarning,
            stacklevel=2,
        )
    return Decoder(vae.eval().requires_grad_(False), latents)


def trace_decoder(decoder: Decoder, model: LoadedModel) -> tuple[ir.Model, tuple[int, int]]:
    """The decoder's graph and the (height, width) of its images."""
    latents = torch.zeros(EXAMPLE_BATCH, *model.signature.state.row_shape)
    with torch.no_grad():
        height, width = decoder(latents[:1]).shape[-2:]
    return trace(decoder, {"latents": latents}, "image"), (int(height), int(width))
