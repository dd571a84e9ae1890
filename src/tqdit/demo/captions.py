"""The text demo's data set: drawn glyphs with captions over a closed vocabulary.

python -m tqdit.demo.captions -n 320 --held-out     captions of random scenes, one a line

A scene says what is drawn: a letter, its weight, two colours, how many and where. `caption` words it, `draw_masks` and
`colour` draw it. One scene in ten (by a hash of letter, weight and colours) is held out: it is never trained on.
Drawing needs matplotlib (extra `demo`) for its font files.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tqdit.demo.glyphs import CLASSES, OVERSAMPLING, font_folder

IMAGE_SIZE = 24
MAX_TOKENS = 16  # of a caption, with its end mark; the longest has 13
COLOURS = {
    "red": (215, 35, 40), "green": (35, 155, 60), "blue": (45, 75, 220), "yellow": (245, 215, 45),
    "orange": (245, 130, 30), "purple": (140, 50, 175), "white": (240, 240, 240), "black": (20, 20, 20),
}  # fmt: skip
COLOUR_JITTER = 12  # of each channel, to either side
WEIGHTS = {
    "thin": ("STIXGeneral", "cmr10", "cmss10", "cmtt10"),
    "bold": ("DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif-Bold", "STIXGeneralBol"),
}
COUNTS = ("one", "two")
PLACES = ("", "left", "right", "top", "bottom")  # "": large and anywhere
PHRASINGS = 4
CAPTIONS_SEED = 23  # of the captions that engines are measured with
HELD_OUT_SHARE = 0.1
MARKS = ("<pad>", "</s>", "<unk>")
WORDS = (
    "a", "an", "on", "at", "the", "background", ",", "s", *COUNTS, *WEIGHTS, *COLOURS, *PLACES[1:],
    *(letter for letter in CLASSES.lower() if letter != "a"),
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What an image shows. weight: "" if the caption leaves it open."""

    letter: str
    weight: str
    ink: str
    ground: str
    count: str = "one"
    place: str = ""


def is_held_out(letter: str, weight: str, ink: str, ground: str) -> bool:
    """Whether this combination is never trained on, whatever the caption says of it."""
    digest = hashlib.sha256(f"{letter}/{weight}/{ink}/{ground}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


@cache
def colour_pairs(letter: str, weight: str, held_out: bool) -> tuple[tuple[str, str], ...]:
    """(ink, ground) that may be combined with a letter and a weight."""
    return tuple(
        (ink, ground) for ink in COLOURS for ground in COLOURS
        if ink != ground and is_held_out(letter, weight, ink, ground) == held_out
    )  # fmt: skip


def caption(scene: Scene, phrasing: int) -> str:
    """The scene in words; phrasing in 0..3."""
    several = scene.count == "two"
    adjectives = [scene.weight, scene.ink] if phrasing != 1 else [scene.ink, scene.weight]
    noun = " ".join([*filter(None, adjectives), scene.letter + "s" * several])
    article = "an" if noun[0] in "aeio" else "a"
    number = "two" if several else {0: article, 1: article, 2: "one", 3: ""}[phrasing]
    things = f"{number} {noun}".strip() + (f" at the {scene.place}" if scene.place else "")
    if phrasing == 1:
        return f"{things} on {'an' if scene.ground == 'orange' else 'a'} {scene.ground} background"
    return f"{scene.ground} background, {things}" if phrasing == 2 else f"{things} on {scene.ground}"


def parse(text: str) -> Scene:
    """The scene of a caption that `caption` wrote. Raises ValueError or IndexError if it is another text."""
    words = text.lower().replace(",", " ").split()
    ink, ground = (word for word in words if word in COLOURS)
    if "background" in words[:-1]:
        ink, ground = ground, ink
    adjectives = [index for index, word in enumerate(words) if word in (ink, *WEIGHTS)]
    letter = CLASSES[CLASSES.lower().index(words[adjectives[-1] + 1].removesuffix("s"))]
    return Scene(
        letter, next((word for word in words if word in WEIGHTS), ""), ink, ground,
        "two" if "two" in words else "one", next((word for word in words if word in PLACES), ""),
    )  # fmt: skip


def draw_scenes(count: int, rng: np.random.Generator, held_out: bool = False) -> list[Scene]:
    """Random scenes with a weight; a quarter has two letters, a quarter has a place."""
    return [colour_scene(scene, rng, held_out) for scene in draw_layouts(count, rng)]


def draw_captions(count: int, held_out: bool = False) -> tuple[str, ...]:
    """Captions of random scenes, the same ones for every engine that is measured."""
    rng = np.random.default_rng(CAPTIONS_SEED)
    return tuple(caption(scene, int(rng.integers(PHRASINGS))) for scene in draw_scenes(count, rng, held_out))


def draw_layouts(count: int, rng: np.random.Generator) -> list[Scene]:
    """Random scenes without colours."""
    kinds = rng.integers(0, 4, count)
    return [
        Scene(
            CLASSES[rng.integers(len(CLASSES))], [*WEIGHTS][rng.integers(2)], "", "",
            COUNTS[int(kind == 0)], PLACES[rng.integers(1, 5)] if kind == 1 else "",
        )
        for kind in kinds
    ]  # fmt: skip


def colour_scene(scene: Scene, rng: np.random.Generator, held_out: bool = False) -> Scene:
    pairs = colour_pairs(scene.letter, scene.weight, held_out)
    ink, ground = pairs[rng.integers(len(pairs))]
    return replace(scene, ink=ink, ground=ground)


def draw_masks(scenes: list[Scene], rng: np.random.Generator) -> NDArray[np.float32]:
    """Ink coverage (N, 24, 24) in 0..1."""
    return np.stack([_draw_mask(scene, rng) for scene in scenes])


def colour(masks: NDArray[np.float32], scenes: list[Scene], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Masks (N, H, W) in 0..1 to images (N, H, W, 3) in the scenes' colours, with some jitter."""
    named = np.array([[COLOURS[scene.ink], COLOURS[scene.ground]] for scene in scenes], np.float32)
    found = np.clip(named + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, named.shape), 0, 255)
    ink, ground = found[:, 0, None, None], found[:, 1, None, None]  # (N, 1, 1, 3)
    return np.round(ground + masks[..., None] * (ink - ground)).astype(np.uint8)


def _draw_mask(scene: Scene, rng: np.random.Generator) -> NDArray[np.float32]:
    fonts = WEIGHTS[scene.weight]
    name = fonts[rng.integers(len(fonts))]
    size, half = IMAGE_SIZE, IMAGE_SIZE / 2
    boxes = {  # left, top, right, bottom, where the ink may lie
        "": (0.5, 0.5, size - 0.5, size - 0.5),
        "left": (0.5, 5, half, size - 5), "right": (half, 5, size - 0.5, size - 5),
        "top": (5, 0.5, size - 5, half), "bottom": (5, half, size - 5, size - 0.5),
    }  # fmt: skip
    if scene.count == "two":
        shift = rng.uniform(-4, 4)
        parts = [(0.5, 4 + shift, half - 0.5, size - 4 + shift), (half + 0.5, 4 + shift, size - 0.5, size - 4 + shift)]
        height = rng.uniform(10, 13)
    else:
        parts = [boxes[scene.place]]
        height = rng.uniform(10, 11.5) if scene.place else rng.uniform(14, 19)
    canvas = Image.new("L", (size * OVERSAMPLING, size * OVERSAMPLING))
    for box in parts:
        _draw_glyph(canvas, scene.letter, name, height, box, rng)
    small = canvas.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / np.float32(255)


def _draw_glyph(
    canvas: Image.Image, letter: str, name: str, height: float, box: tuple[float, ...], rng: np.random.Generator
) -> None:
    """The letter, smaller if it is too wide, at a random place within the box (in image pixels)."""
    x0, y0, x1, y1 = (edge * OVERSAMPLING for edge in box)
    points = round(height * OVERSAMPLING / 0.7)  # capitals and digits are about 0.7 of the point size high
    left, top, right, bottom = _font(name, points).getbbox(letter)
    excess = max((right - left) / (x1 - x0), (bottom - top) / (y1 - y0))
    if excess > 1:
        points = int(points / excess)
        left, top, right, bottom = _font(name, points).getbbox(letter)
    x = rng.uniform(x0, max(x0, x1 - (right - left))) - left
    y = rng.uniform(y0, max(y0, y1 - (bottom - top))) - top
    ImageDraw.Draw(canvas).text((x, y), letter, fill=255, font=_font(name, points))


@cache
def _font(name: str, points: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_folder() / f"{name}.ttf"), points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--held-out", action="store_true", help="combinations that were never trained on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng([args.seed, 17])
    for scene in draw_scenes(args.n, rng, args.held_out):
        print(caption(scene, int(rng.integers(PHRASINGS))))


if __name__ == "__main__":
    main()
