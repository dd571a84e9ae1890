"""The demo model's judge: a small convolutional classifier that takes Inception's place for 16x16 glyphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tqdit.demo.glyphs import CLASSES


class Judge(nn.Module):
    """Images (N, 3, 16, 16) in -1..1 to (class logits (N, 16), features (N, 128))."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = _stage(3, 32)  # 16 -> 8
        self.stage2 = _stage(32, 64)  # 8 -> 4
        self.stage3 = _stage(64, 64)  # 4 -> 2
        self.features = nn.Linear(64 * 2 * 2, 128)
        self.head = nn.Linear(128, len(CLASSES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.stage3(self.stage2(self.stage1(images))).flatten(1)
        features = torch.relu(self.features(hidden))
        return self.head(features), features


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip
