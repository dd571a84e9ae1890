"""The network of a recorded pipeline as the stages take it: any class of diffusers, or a module of one's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from tqdit.errors import UsageError
from tqdit.interface import Interface
from tqdit.models import quirks
from tqdit.models.known import fix_arguments
from tqdit.models.loaded import LoadedModel, arguments_of, fingerprint, in_one_line
from tqdit.models.products import find_products_and_shape, stand_in
from tqdit.models.weights import IN_MEMORY, Weights
from tqdit.registry import find_modules

EXAMPLE_ROWS = 2
RECORD = (
    "Its inputs are learned from calls: pass --prompts or --rows to tqdit-calibrate, --rows to tqdit-export, or record "
    "a pipeline with tqdit.record."
)
# Classes that tests/zoo takes through the whole flow; the command traces any other one in a child process.
PROVEN = (
    "AuraFlowTransformer2DModel", "ChromaTransformer2DModel", "CogVideoXTransformer3DModel", "Flux2Transformer2DModel",
    "FluxTransformer2DModel", "HunyuanDiT2DModel", "LTXVideoTransformer3DModel", "Lumina2Transformer2DModel",
    "PixArtTransformer2DModel", "QwenImageTransformer2DModel", "SD3Transformer2DModel", "SanaTransformer2DModel",
    "WanTransformer3DModel", "ZImageTransformer2DModel",
)  # fmt: skip


def recorded_model(
    network: nn.Module, interface: Interface, source: str = "pipeline", vae_folder: Path | None = None,
    weights: Weights = IN_MEMORY,
) -> LoadedModel:  # fmt: skip
    """The network that `interface` was learned from, in float32; its float32 parameters are shared, not copied.

    source: what the user names it by. weights: where the values of its parameters lie. Raises UsageError if the network
    does not take such calls.
    """
    network = float_copy(network)
    for quirk in find_modules(quirks).values():
        if interface.signature.family in quirk.CLASSES:
            quirk.prepare(network, interface.signature.state.row_shape)
    constants = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in interface.constants.items()
    }
    alike = {name: constants.pop(name) for name in interface.alike}
    fix_arguments(network, alike, interface.signature.state.name)
    rows = {name: torch.from_numpy(array) for name, array in interface.signature.zeros(EXAMPLE_ROWS).items()}
    example = arguments_of(interface.signature, constants, rows)
    with in_one_line(source, "the observation of one recorded call"):
        products, shape = find_products_and_shape(network, example, rows=EXAMPLE_ROWS)
    if (found := tuple(shape[1:])) != interface.signature.output_shape:
        raise UsageError(
            f"{source}: the network predicts {found}, in the recorded calls {interface.signature.output_shape}. "
            "Record it again."
        )
    return LoadedModel(
        network=network,
        signature=interface.signature,
        products=products,
        sampling=interface.sampling,
        guidance=interface.guidance,
        latents=interface.latents,
        text=interface.text,
        origin="diffusers",
        source=source,
        fingerprint=fingerprint(network, interface.signature.family, weights),
        constants=constants,
        alike=alike,
        config=interface.config,
        vae_folder=vae_folder,
        weights=weights,
    )


def float_copy(network: nn.Module) -> nn.Module:
    """A float32 copy that can be changed while the pipeline goes on with its own; float32 tensors are shared."""
    return stand_in(network).float().eval().requires_grad_(False)
