"""The text demo's judge: a small convolutional classifier with one head for each thing that a caption names."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tqdit.demo.captions import COLOURS, COUNTS, PLACES, WEIGHTS, Scene
from tqdit.demo.glyphs import CLASSES
from tqdit.demo.judge import stage

CHOICES: dict[str, tuple[str, ...]] = {  # of each field of a scene that is judged
    "letter": tuple(CLASSES), "weight": tuple(WEIGHTS), "ink": tuple(COLOURS), "ground": tuple(COLOURS),
    "count": COUNTS, "place": PLACES,
}  # fmt: skip


class TextJudge(nn.Module):
    """Images (N, 3, 24, 24) in -1..1 to the logits of each field of `CHOICES`, (N, choices)."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(stage(3, 32), stage(32, 64), stage(64, 64))  # 24 -> 12 -> 6 -> 3
        self.features = nn.Linear(64 * 3 * 3, 128)
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(choices)) for name, choices in CHOICES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = torch.relu(self.features(self.stages(images).flatten(1)))
        return {name: head(features) for name, head in self.heads.items()}


def truth(scenes: list[Scene]) -> dict[str, NDArray[np.int64]]:
    """Places (N,) in `CHOICES`; -1 where a caption leaves a field open."""
    return {
        name: np.array([choices.index(value) if (value := getattr(scene, name)) in choices else -1 for scene in scenes])
        for name, choices in CHOICES.items()
    }


@torch.no_grad()
def recognised(images: Tensor, scenes: list[Scene], judge: TextJudge) -> dict[str, NDArray[np.bool_]]:
    """Per field, whether the judge sees what was asked for, for the images whose captions name it.

    images: (N, 3, 24, 24) in -1..1.
    """
    parts = [judge(part) for part in images.split(1024)]
    guesses = {name: torch.cat([part[name].argmax(1) for part in parts]).numpy() for name in CHOICES}
    wanted = truth(scenes)
    return {name: guesses[name][wanted[name] >= 0] == wanted[name][wanted[name] >= 0] for name in CHOICES}
