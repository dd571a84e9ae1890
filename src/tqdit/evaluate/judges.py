"""The judges of the shipped models, and the data that these were trained on.

Each judge is an extractor that also says what an image shows: the class demo's its class, the text demo's its letter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tqdit.demo import captions, glyphs
from tqdit.demo.text_judge import CHOICES, load_text_judge, truth
from tqdit.demo.weights import TEXT
from tqdit.errors import UsageError
from tqdit.evaluate.extractors import Extractor, Features, JudgeExtractor, batches, weights_digest
from tqdit.evaluate.samples import Images


class TextJudgeExtractor:
    """The text demo's judge: 128 features, and the probabilities of the letters. No spatial features."""

    name = "text judge"
    size, classes, is_judge = 128, len(CHOICES["letter"]), True

    def __init__(self) -> None:
        self._judge = load_text_judge()
        self.digest = weights_digest(self._judge.state_dict())

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        side = captions.IMAGE_SIZE
        if images.shape[1:] != (side, side, 3):
            raise UsageError(
                f"the text demo's judge knows images of {side}x{side}, these are {images.shape[2]}x{images.shape[1]}. "
                "Pass --inception-weights FILE for other models."
            )
        parts = []
        for x in batches(images):
            features = torch.relu(self._judge.features(self._judge.stages(x.float() / 127.5 - 1).flatten(1)))
            probabilities = self._judge.heads["letter"](features).softmax(1)
            parts.append(Features(features.numpy(), None, probabilities.numpy()))
        return Features.join(parts)


@dataclass(frozen=True)
class ShippedJudge:
    """draw: count, seed -> images such as the model was trained on, with what they show."""

    image_size: int
    extractor: Callable[[], Extractor]
    draw: Callable[[int, int], Images]


def class_data(count: int, seed: int) -> Images:
    """Pictures such as the class demo was trained on, classes in turn."""
    return Images(*glyphs.draw(count, seed), f"{count} drawings of the demo data set, seed {seed}")


def text_data(count: int, seed: int) -> Images:
    """Pictures such as the text demo was trained on; their labels are the letters."""
    rng = np.random.default_rng(seed)
    scenes = captions.draw_scenes(count, rng)
    pixels = captions.colour(captions.draw_masks(scenes, rng), scenes, rng)
    return Images(pixels, truth(scenes)["letter"], f"{count} drawings of the text demo's data set, seed {seed}")


JUDGES = {
    "demo": ShippedJudge(glyphs.IMAGE_SIZE, JudgeExtractor, class_data),
    TEXT: ShippedJudge(captions.IMAGE_SIZE, TextJudgeExtractor, text_data),
}


def letters(texts: Sequence[str]) -> NDArray[np.int64] | None:
    """The letter that each caption asks for (N,), as a place in the judge's choices; None if one is no caption."""
    try:
        return truth([captions.parse(text) for text in texts])["letter"]
    except (ValueError, IndexError):
        return None
