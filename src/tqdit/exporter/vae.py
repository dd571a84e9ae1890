"""The decoder of a diffusers VAE as an ONNX graph: states -> image float[B,3,H,W], or video float[B,3,F,H,W]."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from tqdit.card import Latents
from tqdit.errors import CheckpointError, TqditWarning, first_line
from tqdit.exporter.passes.names import forget_sources
from tqdit.exporter.trace import EXAMPLE_BATCH, OPSETS, trace_any_rows
from tqdit.extras import need
from tqdit.models.decoding import to_codes
from tqdit.models.directories import find_weights
from tqdit.models.loaded import LoadedModel
from tqdit.models.making import bounded
from tqdit.models.state import check_places, read_json
from tqdit.models.vae import latents_of
from tqdit.sampling.process import Recorded, Unsampled

RECORD = "Record at least one call of the pipeline that decodes, without output_type='latent'."


class Decoder(nn.Module):
    """From states to codes (`Latents`), then decode. forward(*inputs) takes one, as `trace` calls it."""

    def __init__(self, vae: Any, latents: Latents) -> None:
        super().__init__()
        self.vae, self.latents = vae, latents

    def forward(self, *inputs: Tensor) -> Tensor:
        (states,) = inputs
        return self.vae.decode(to_codes(states, self.latents), return_dict=False)[0]


@dataclass(frozen=True, eq=False)
class DecoderGraph:
    """A traced decoder, and the size of its images; frames: of a video."""

    model: ir.Model
    height: int
    width: int
    frames: int | None


def check_decoder(folder: Path) -> dict[str, object]:
    """The configuration of a diffusers VAE directory. Refuses any other folder, which needs no model to be loaded."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{folder}: no config.json in it. Pass the directory of a diffusers AutoencoderKL.")
    config = read_json(config_file)
    if not str(config.get("_class_name")).startswith("Autoencoder"):
        raise CheckpointError(
            f"{config_file}: '_class_name' is {config.get('_class_name')!r}, expected a VAE such as 'AutoencoderKL'."
        )
    return config


def find_decoder(model: LoadedModel, chosen: Path | nn.Module | None) -> Path | nn.Module | None:
    """The VAE to export with a model: the chosen one, else that of its pipeline directory, if it can be used."""
    if chosen is not None or model.latents is not None or model.vae_folder is None:
        return model.vae_folder if chosen is None else chosen
    if isinstance(model.sampling.process, Recorded):
        text = f"{model.source}: its decoder is left out, since no recorded call used it. {RECORD}"
        warnings.warn(text, TqditWarning, stacklevel=3)
    return None


def load_decoder(source: Path | nn.Module, model: LoadedModel) -> Decoder:
    """The decoder of a diffusers VAE, in a directory or in memory; refuses one that does not fit the model.

    Its `latents` are those of the VAE's configuration, or of a recorded pipeline what was learned: a model that is
    exported with it takes them over. Warns if they are not what the model tells or takes for granted.
    """
    where = source if isinstance(source, Path) else f"{type(source).__name__} in memory"
    if model.latents is None:
        raise CheckpointError(f"{where}: {_no_latents(model)}")
    wanted = model.latents.decoder
    config: Mapping[str, Any]
    if isinstance(source, Path):
        check_places(source, source.parent if source == model.vae_folder else source)  # which links must not leave
        config = check_decoder(source)
        name = config.get("_class_name")
    else:
        config, name = dict(getattr(source, "config", {})), type(source).__name__
    if name != wanted:
        raise CheckpointError(f"{where}: a VAE of class {name!r}, expected '{wanted}'. Pass the model's own VAE.")
    if model.latents.layout is None and config.get("latent_channels") != model.signature.channels:
        raise CheckpointError(
            f"{where}: latent_channels is {config.get('latent_channels')}, the model has {model.signature.channels}. "
            "Pass the VAE that the model was trained with."
        )
    vae = _read(source, wanted) if isinstance(source, Path) else copy.deepcopy(source).float()
    own = model.latents if model.latents.layout else latents_of(where, config)
    latents = model.latents if model.told_latents else own
    if latents != model.latents:
        warnings.warn(
            f"{where}: its latents have {latents}, those of {model.source} {model.latents}. The decoder's are taken; "
            "if that is right, say so in the model card.",
            TqditWarning,
            stacklevel=2,
        )
    return Decoder(vae.eval().requires_grad_(False), latents)


def trace_decoder(decoder: Decoder, model: LoadedModel) -> DecoderGraph:
    """The decoder's graph and the size of its images."""
    latents = torch.zeros(EXAMPLE_BATCH, *model.signature.state.row_shape)
    with torch.no_grad():
        _, _, *frames, height, width = decoder(latents[:1]).shape
    graph = trace_any_rows(decoder, {"latents": latents}, "image", OPSETS.start)
    forget_sources(graph)
    return DecoderGraph(graph, int(height), int(width), int(frames[0]) if frames else None)


def _no_latents(model: LoadedModel) -> str:
    if isinstance(model.sampling.process, Recorded | Unsampled):
        return f"no decoded states were recorded, or they were refused. {RECORD}"
    return (
        f'{model.source} works on images and needs no decoder. Leave out --vae, or say "space": "latents" in its model '
        "card."
    )


def _read(folder: Path, name: str) -> Any:
    diffusers = need("diffusers", "vae", "exporting a VAE decoder")
    _, variant = find_weights(folder)
    try:
        with bounded(folder, folder):
            return getattr(diffusers, name).from_pretrained(
                folder, local_files_only=True, torch_dtype=torch.float32, variant=variant
            )
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: its weights cannot be loaded ({first_line(error)}). Get the directory again."
        ) from error
