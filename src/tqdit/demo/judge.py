"""The demo model's judge: a small convolutional classifier that takes Inception's place for 16x16 glyphs.

python -m tqdit.demo.judge samples.npz     how many of the samples show the class that they were asked for
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from tqdit.demo.glyphs import CLASSES
from tqdit.demo.weights import shipped
from tqdit.files import read_npz


class Judge(nn.Module):
    """Images (N, 3, 16, 16) in -1..1 to (class logits (N, 16), features (N, 128))."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = stage(3, 32)  # 16 -> 8
        self.stage2 = stage(32, 64)  # 8 -> 4
        self.stage3 = stage(64, 64)  # 4 -> 2
        self.features = nn.Linear(64 * 2 * 2, 128)
        self.head = nn.Linear(128, len(CLASSES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.stage3(self.stage2(self.stage1(images))).flatten(1)
        features = torch.relu(self.features(hidden))
        return self.head(features), features


def load_judge() -> Judge:
    """The trained judge, of the distribution `tqdit-demo`."""
    judge = Judge()
    weights = load_file(shipped("judge.safetensors"))
    judge.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return judge.eval().requires_grad_(False)


def recognised(images: NDArray[np.uint8], labels: NDArray[np.int64], judge: Judge | None = None) -> NDArray[np.bool_]:
    """Whether the judge sees in each image uint8 (N, 16, 16, 3) the class that it was asked for: bool (N,)."""
    judge = judge or load_judge()
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    guesses = torch.cat([judge(part)[0].argmax(dim=1) for part in x.split(1024)])
    return np.asarray(guesses.numpy() == labels)


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson score)."""
    z = 1.96
    p, spread = successes / count, z * z / count
    half = z * math.sqrt(p * (1 - p) / count + spread / (4 * count))
    return (p + spread / 2 - half) / (1 + spread), (p + spread / 2 + half) / (1 + spread)


def stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip


def main(path: Path) -> None:
    content = read_npz(path)
    right = recognised(content["arr_0"], content["arr_1"])
    low, high = wilson_interval(int(right.sum()), len(right))
    print(
        f"quality: the judge recognises {right.mean():.1%} of {len(right)} samples "
        f"(95 % interval {low:.1%} to {high:.1%})"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
