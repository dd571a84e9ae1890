"""How far a quantized model ends up from the float one: the same chains from the same noise.

The chain decides, not eps alone: most of the eps error sits at the clean steps, while the noisy ones decide the content
of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.rows import CalibrationRows, Picks, Trajectory
from tqdit.models.loaded import LoadedModel

NOTHING = np.zeros(0, np.int64)
NO_PICKS = Picks(NOTHING, NOTHING, NOTHING, np.zeros(0))


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


def final_samples(model: LoadedModel, steps: int, images: int, guidance_scale: float | None, seed: int) -> Tensor:
    """x_0 of chains with seeded noise and requests, (images, C, ...)."""
    config = QuantizationConfig(steps=steps, chains=images, guidance_scale=guidance_scale, seed=seed)
    trajectory = Trajectory(model, config, NO_PICKS)
    while trajectory.next_step >= 0:
        trajectory.advance()
    return torch.from_numpy(trajectory.chains.x.copy())


def chain_error(reference: Tensor, found: Tensor) -> ChainError:
    """Error of final samples (B, C, H, W) against those of the float model from the same noise."""
    difference = (found - reference).square().flatten(1).sum(1)
    return ChainError(tuple((difference / reference.square().flatten(1).sum(1)).tolist()))


@torch.no_grad()
def eps_error(model: LoadedModel, quantized: LoadedModel, rows: CalibrationRows) -> float:
    """Squared error of the prediction on given rows, relative to its energy."""
    channels = model.signature.channels
    a, b = (each.call(rows.inputs)[:, :channels] for each in (model, quantized))
    return float((a - b).square().sum() / a.square().sum())
