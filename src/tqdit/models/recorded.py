"""A network of a recorded pipeline as the stages take it: any transformer class of diffusers, or a module of one's own."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tqdit.models.arguments import nest
from tqdit.models.loaded import LoadedModel, fingerprint
from tqdit.models.products import find_products
from tqdit.models.recording import Recording

EXAMPLE_ROWS = 2


def recorded_model(network: nn.Module, recording: Recording, source: str = "pipeline") -> LoadedModel:
    """The network that `recording` was made of, in float32; its float32 parameters are shared, not copied.

    source: what the user names it by. Raises UsageError if the network does not take the recorded calls.
    """
    network = _explicit_copy(network)
    rows = {name: torch.from_numpy(array) for name, array in recording.example(EXAMPLE_ROWS).items()}
    return LoadedModel(
        network=network,
        signature=recording.signature,
        products=find_products(network, nest({**recording.constants, **rows}), rows=EXAMPLE_ROWS),
        sampling=recording.sampling,
        guidance=recording.guidance,
        latents=None,
        origin="diffusers",
        source=source,
        fingerprint=fingerprint(network, recording.signature.family),
        constants=recording.constants,
    )


def _explicit_copy(network: nn.Module) -> nn.Module:
    """A copy whose attention can be made explicit while the pipeline goes on with its own."""
    shared = {id(tensor): tensor for tensor in network.parameters()}
    return copy.deepcopy(network, shared).float().eval().requires_grad_(False)
