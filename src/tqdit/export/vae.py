"""The decoder of a diffusers `AutoencoderKL` as an ONNX graph: latents float[B,C,h,w] -> image float[B,3,H,W]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from tqdit.errors import CheckpointError
from tqdit.export.trace import trace
from tqdit.extras import need
from tqdit.models.loaded import LoadedModel
from tqdit.models.state import read_json


class Decoder(nn.Module):
    """Undo the latent scale, then decode."""

    def __init__(self, vae: Any, latent_scale: float) -> None:
        super().__init__()
        self.vae = vae
        self.latent_scale = latent_scale

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.latent_scale, return_dict=False)[0]


def load_decoder(folder: Path, model: LoadedModel) -> Decoder:
    """The decoder in a diffusers VAE directory; refuses one that does not fit the model."""
    if model.latent_scale is None:
        raise CheckpointError(f"{folder}: --vae was given, but {model.source} works on images and needs no decoder.")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{folder}: no config.json in it. Pass the directory of a diffusers AutoencoderKL.")
    config = read_json(config_file)
    if config.get("_class_name") != "AutoencoderKL":
        raise CheckpointError(
            f"{config_file}: '_class_name' is {config.get('_class_name')!r}, expected 'AutoencoderKL'."
        )
    if config.get("latent_channels") != model.in_channels:
        raise CheckpointError(
            f"{config_file}: latent_channels is {config.get('latent_channels')}, the model has {model.in_channels}. "
            "Pass the VAE that the model was trained with."
        )
    diffusers = need("diffusers", "vae", "exporting a VAE decoder")
    try:
        vae = diffusers.AutoencoderKL.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: its weights cannot be loaded ({reason}). Get the directory again.") from error
    scale = float(str(config.get("scaling_factor", model.latent_scale)))
    return Decoder(vae.eval().requires_grad_(False), scale)


def trace_decoder(decoder: Decoder, model: LoadedModel) -> tuple[ir.Model, tuple[int, int]]:
    """The decoder's graph and the (height, width) of its images."""
    latents = torch.zeros(3, model.in_channels, model.height, model.width)
    with torch.no_grad():
        height, width = decoder(latents[:1]).shape[-2:]
    return trace(decoder, {"latents": latents}, "image"), (int(height), int(width))
