"""The text demo's judge: a small convolutional classifier with one head for each thing that a caption names.

python -m tqdit.demo.text_judge samples.npz captions.txt     how many of the samples show what their captions name
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from tqdit.demo.captions import COLOURS, COUNTS, PLACES, WEIGHTS, Scene, parse
from tqdit.demo.glyphs import CLASSES
from tqdit.demo.judge import stage, wilson_interval
from tqdit.demo.weights import shipped
from tqdit.files import read_npz

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
    """Places (N,) in `CHOICES`; -1 if a caption leaves a field open."""
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


def load_text_judge() -> TextJudge:
    """The trained judge, of the distribution `tqdit-demo`."""
    judge = TextJudge()
    weights = load_file(shipped("text/judge.safetensors"))
    judge.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return judge.eval().requires_grad_(False)


def _scene(path: Path, lines: list[str], number: int) -> Scene:
    try:
        return parse(lines[number])
    except (ValueError, IndexError):
        raise SystemExit(f"{path}: line {number + 1} is missing or no caption such as 'a bold red A on blue'") from None


def main(samples: Path, texts: Path) -> None:
    content = read_npz(samples)
    lines = texts.read_text(encoding="utf-8").splitlines()
    scenes = [_scene(texts, lines, number) for number in content["arr_1"]]
    images = torch.from_numpy(content["arr_0"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    for name, right in recognised(images, scenes, load_text_judge()).items():
        if len(right):
            low, high = wilson_interval(int(right.sum()), len(right))
            print(f"{name:8} {right.mean():.1%} of {len(right)} samples (95 % interval {low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
