"""What a loader hands on: a network behind one seam, and the facts that the stages need about it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from tqdit.diffusion import SamplingSpec


@dataclass(frozen=True)
class LoadedModel:
    """A float32 network in eval mode: (x (N, C, H, W), timestep (N,) int64, class_labels (N,) int64) -> (N, K, H, W).

    K is C (noise alone) or 2 C (noise, then the variance fraction). Label `num_classes` is the null class. Nothing
    downstream knows more about an architecture than this.
    """

    network: nn.Module
    in_channels: int
    out_channels: int
    height: int
    width: int
    num_classes: int
    origin: str
    source: str  # what the user wrote: 'demo' or a path
    fingerprint: str  # SHA-256 over configuration and weights
    sampling: SamplingSpec  # as the origin samples
    guidance_scale: float
    latent_scale: float | None  # None: x is an image in -1..1
    class_names: tuple[str, ...] = ()
    vae_folder: Path | None = field(default=None, compare=False)  # of a pipeline directory

    @property
    def learns_variance(self) -> bool:
        return self.out_channels == 2 * self.in_channels

    @property
    def device(self) -> torch.device:
        """Where the network's weights lie."""
        return next((parameter.device for parameter in self.network.parameters()), torch.device("cpu"))

    def to(self, device: str | torch.device) -> LoadedModel:
        """The model on another device. Its network moves: there is no second copy of the weights."""
        return replace(self, network=self.network.to(device))

    def with_source(self, source: str) -> LoadedModel:
        return replace(self, source=source)


def fingerprint(network: nn.Module, configuration: object) -> str:
    """SHA-256 over the configuration and every parameter's name, shape and float32 bytes, in the order of names."""
    digest = hashlib.sha256(repr(configuration).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to(torch.float32).contiguous().numpy().data)
    return digest.hexdigest()
