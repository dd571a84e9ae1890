"""How the states of a latent model relate to the codes of its VAE, as a diffusers VAE directory says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdit.card import Latents
from tqdit.errors import CheckpointError
from tqdit.models.state import read_json, read_number

LATENT_SCALE, LATENT_CHANNELS = 0.18215, 4  # of Stable Diffusion's VAE, which DiT was trained with


def read_latents(folder: Path, root: Path) -> Latents:
    """Those of a VAE directory. root: the folder that links must not leave."""
    path = folder / "config.json"
    return latents_of(path, read_json(path, root))


def latents_of(where: object, settings: Mapping[str, Any]) -> Latents:
    """`scaling_factor` and `shift_factor` of a VAE's configuration.

    Raises CheckpointError if it has a scale for each channel, which DiTPipeline does not apply.
    """
    if told := [name for name in ("latents_mean", "latents_std") if settings.get(name) is not None]:
        raise CheckpointError(
            f"{where}: it tells {' and '.join(told)}, one value for each channel, which DiTPipeline does not "
            "apply. Set them to null if the model was trained without them."
        )
    shift = 0.0 if settings.get("shift_factor") is None else read_number(where, settings, "shift_factor", 0.0)
    return Latents(read_number(where, settings, "scaling_factor", LATENT_SCALE), shift)
