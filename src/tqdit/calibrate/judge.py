"""How far a quantized model ends up from the float one: the same chains from the same noise.

The chain decides, not eps alone: most of the eps error sits at the clean steps, while the noisy ones decide the content
of an image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tqdit.calibrate.config import QuantizationConfig
from tqdit.calibrate.rows import CalibrationRows, Chains, Picks
from tqdit.diffusion import SamplingSpec
from tqdit.models import LoadedModel

NO_PICKS = Picks(*(np.zeros(0, dtype=np.int64) for _ in range(4)))


@dataclass(frozen=True)
class ChainError:
    """Squared errors against float, relative to the float energy: per image (B,), and their mean."""

    per_image: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.per_image))

    @property
    def standard_error(self) -> float:
        return float(np.std(self.per_image, ddof=1) / len(self.per_image) ** 0.5)


def final_samples(model: LoadedModel, steps: int, images: int, guidance_scale: float, seed: int) -> Tensor:
    """x_0 of guided chains with seeded noise and classes, (images, C, H, W)."""
    config = QuantizationConfig(steps=steps, chains=images, guidance_scale=guidance_scale, seed=seed)
    chains = Chains(model, replace(model.sampling, steps=steps), config, NO_PICKS)
    while chains.next_step >= 0:
        chains.advance()
    return chains.x


def chain_error(reference: Tensor, found: Tensor) -> ChainError:
    """Error of final samples (B, C, H, W) against those of the float model from the same noise."""
    difference = (found - reference).square().flatten(1).sum(1)
    return ChainError(tuple((difference / reference.square().flatten(1).sum(1)).tolist()))


@torch.no_grad()
def eps_error(model: LoadedModel, quantized: LoadedModel, rows: CalibrationRows, spec: SamplingSpec) -> float:
    """Squared error of the predicted noise on given rows, relative to its energy."""
    channels = model.in_channels
    a = model.network(rows.x, rows.timestep, rows.label)[:, :channels]
    b = quantized.network(rows.x, rows.timestep, rows.label)[:, :channels]
    return float((a - b).square().sum() / a.square().sum())
