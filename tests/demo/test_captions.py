"""The text demo's scenes, captions, drawings and the combinations that are held out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tqdit.demo.captions import (
    COLOURS,
    IMAGE_SIZE,
    PHRASINGS,
    WEIGHTS,
    Scene,
    caption,
    colour,
    colour_pairs,
    draw_masks,
    draw_scenes,
    is_held_out,
    parse,
)  # fmt: skip
from tqdit.demo.glyphs import CLASSES

RED_A = Scene("A", "bold", "red", "blue")


@pytest.mark.parametrize(("scene", "phrasing", "text"), [
    (RED_A, 0, "a bold red A on blue"),
    (Scene("7", "", "green", "black", "two"), 0, "two green 7s on black"),
    (replace(RED_A, ground="orange"), 1, "a red bold A on an orange background"),
    (Scene("X", "", "orange", "white", place="top"), 0, "an orange X at the top on white"),
    (replace(RED_A, place="left"), 2, "blue background, one bold red A at the left"),
    (RED_A, 3, "bold red A on blue"),
])  # fmt: skip
def test_a_scene_is_worded_in_several_ways(scene, phrasing, text):
    assert caption(scene, phrasing) == text


def test_a_caption_says_all_that_is_in_its_scene():
    scenes = draw_scenes(400, np.random.default_rng(0))
    scenes += [replace(scene, weight="") for scene in scenes[:100]]
    for scene in scenes:
        for phrasing in range(PHRASINGS):
            assert parse(caption(scene, phrasing)) == scene
            assert parse(caption(scene, phrasing).lower()) == scene  # as a pipeline passes it on


def test_one_combination_in_ten_is_held_out_whatever_else_a_scene_holds():
    shares = [len(colour_pairs(letter, weight, True)) for letter in CLASSES for weight in WEIGHTS]
    assert sum(shares) == 168  # of 16 x 2 x 56: another number is another split
    assert min(shares) > 0
    for held_out in (False, True):
        for scene in draw_scenes(300, np.random.default_rng(1), held_out):
            assert is_held_out(scene.letter, scene.weight, scene.ink, scene.ground) == held_out
            assert scene.ink != scene.ground


def test_drawings_are_reproducible_and_in_their_colours():
    scenes = draw_scenes(64, np.random.default_rng(2))
    images, again = (colour(draw_masks(scenes, rng), scenes, rng) for rng in map(np.random.default_rng, (3, 3)))
    np.testing.assert_array_equal(images, again)
    assert images.shape == (64, IMAGE_SIZE, IMAGE_SIZE, 3)
    named = np.array([*COLOURS.values()], np.float32)
    for image, scene in zip(images.astype(np.float32), scenes, strict=True):
        nearest = np.abs(image[:, :, None] - named).sum(-1).argmin(-1).ravel()
        seen = np.bincount(nearest, minlength=len(COLOURS))
        assert [*COLOURS][seen.argmax()] == scene.ground
        assert np.abs(image - np.array(COLOURS[scene.ink])).sum(-1).min() < 60


def test_weight_count_and_place_change_the_ink():
    def ink(**changes: str) -> np.ndarray:
        scene = replace(Scene("H", "bold", "red", "blue"), **changes)
        return draw_masks([scene] * 24, np.random.default_rng(4)).mean(0)

    assert ink(weight="thin").sum() < 0.7 * ink().sum()
    half = IMAGE_SIZE // 2
    for place, where in {
        "left": np.s_[:, half:], "right": np.s_[:, :half], "top": np.s_[half:], "bottom": np.s_[:half]
    }.items():  # fmt: skip
        assert ink(place=place)[where].max() < 0.05
    assert ink(count="two")[:, half - 1 : half + 1].max() < 0.8 * ink(count="two").max()
