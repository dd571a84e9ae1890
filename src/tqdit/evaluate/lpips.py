"""LPIPS of image pairs, if its weights are available (Zhang et al., arXiv 1801.03924, version 0.1 on VGG16).

Two local files: torchvision's VGG16 (`features.N.weight`) and LPIPS' own linear weights (`linN.model.1.weight`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tqdit.errors import CheckpointError
from tqdit.evaluate.extractors import batches, read_weights
from tqdit.evaluate.paired import check_pairs

# Positions of VGG16's convolutions among its layers; a pooling stands before the first of each later stage.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in -1..1


class Lpips:
    """uint8 images (N, H, W, 3), twice, to distances (N,); at least 16 pixels wide and high."""

    def __init__(self, vgg: Path, linear: Path) -> None:
        self._vgg, self._linear = read_weights(vgg), read_weights(linear)
        needed = [f"features.{index}.{kind}" for stage in STAGES for index in stage for kind in ("weight", "bias")]
        for path, state, names in (
            (vgg, self._vgg, needed), (linear, self._linear, [f"lin{i}.model.1.weight" for i in range(len(STAGES))])
        ):  # fmt: skip
            missing = [name for name in names if name not in state]
            if missing:
                raise CheckpointError(
                    f"{path}: holds no '{missing[0]}'. Pass torchvision's VGG16 and LPIPS' vgg.pth, in this order."
                )

    @torch.no_grad()
    def __call__(self, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
        check_pairs(a, b)
        return np.concatenate([self._distance(x, y) for x, y in zip(batches(a), batches(b), strict=True)])

    def _distance(self, a: Tensor, b: Tensor) -> NDArray[np.float64]:
        total = torch.zeros(len(a))
        for index, (x, y) in enumerate(zip(self._features(a), self._features(b), strict=True)):
            weight = self._linear[f"lin{index}.model.1.weight"].float()
            total += F.conv2d((x - y).square(), weight).mean(dim=(1, 2, 3))
        found: NDArray[np.float64] = total.double().numpy()
        return found

    def _features(self, images: Tensor) -> list[Tensor]:
        """The last activation of each stage, every position's channels scaled to length 1."""
        shift, scale = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (SHIFT, SCALE))
        x = (images.float() / 127.5 - 1 - shift) / scale
        taps = []
        for number, stage in enumerate(STAGES):
            x = F.max_pool2d(x, 2) if number else x
            for layer in stage:
                weight, bias = (self._vgg[f"features.{layer}.{kind}"].float() for kind in ("weight", "bias"))
                x = torch.relu(F.conv2d(x, weight, bias, padding=1))
            taps.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return taps
