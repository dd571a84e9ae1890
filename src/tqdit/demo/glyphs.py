"""The demo model's data set: coloured glyphs of 16 classes, drawn from the fonts that matplotlib bundles.

There is no download and nothing to store: an image is a class, a font, a size, a position and two colours, drawn
from a seed. Drawing needs matplotlib (extra `demo`) for its font files.
"""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CLASSES = "0123456789AEHKRX"
IMAGE_SIZE = 16
OVERSAMPLING = 6  # glyphs are drawn this many times larger and averaged down, so edges are soft
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmss10", "cmtt10", "cmb10",
)  # fmt: skip
GLYPH_HEIGHT = (9.0, 13.5)  # of the ink, in image pixels
MARGIN = 0.75  # the ink stays this far from the border, in image pixels


def draw(count: int, seed: int, pool_size: int = 65536) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """`count` images (N, 16, 16, 3) uint8 and their labels (N,) in 0..15."""
    masks, labels = draw_masks(min(count, pool_size), seed)
    rng = np.random.default_rng([seed, 1])
    chosen = np.arange(count) if count <= pool_size else rng.integers(0, pool_size, count)
    return colour(masks[chosen], rng), labels[chosen]


def draw_masks(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Ink coverage (N, 16, 16) in 0..1 and labels (N,); classes in turn, everything else random."""
    rng = np.random.default_rng([seed, 0])
    masks = np.empty((count, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    fonts: dict[tuple[str, int], ImageFont.FreeTypeFont] = {}
    for index in range(count):
        masks[index] = _draw_mask(CLASSES[labels[index]], rng, fonts)
    return masks, labels


def _draw_mask(
    glyph: str, rng: np.random.Generator, fonts: dict[tuple[str, int], ImageFont.FreeTypeFont]
) -> NDArray[np.float32]:
    name = FONTS[rng.integers(len(FONTS))]
    height = rng.uniform(*GLYPH_HEIGHT) * OVERSAMPLING
    points = max(1, round(height / 0.72))  # capitals and digits are about 0.72 of the point size high
    font = fonts.get((name, points))
    if font is None:
        font = fonts[name, points] = ImageFont.truetype(str(font_folder() / f"{name}.ttf"), points)
    left, top, right, bottom = font.getbbox(glyph)
    canvas = IMAGE_SIZE * OVERSAMPLING
    free_x, free_y = canvas - (right - left), canvas - (bottom - top)
    margin = MARGIN * OVERSAMPLING
    x = rng.uniform(margin, max(margin, free_x - margin)) - left
    y = rng.uniform(margin, max(margin, free_y - margin)) - top
    image = Image.new("L", (canvas, canvas))
    ImageDraw.Draw(image).text((x, y), glyph, fill=255, font=font)
    small = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / np.float32(255)


def colour(masks: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Masks (N, H, W) in 0..1 to images (N, H, W, 3): a bright glyph on a dark ground, or now and then the reverse."""
    n = len(masks)
    bright = _hsv(rng.uniform(0, 1, n), rng.uniform(0.25, 1, n), rng.uniform(0.8, 1, n))
    dark = _hsv(rng.uniform(0, 1, n), rng.uniform(0.3, 1, n), rng.uniform(0.05, 0.4, n))
    swap = (rng.uniform(0, 1, n) < 0.25)[:, None]
    ink, ground = np.where(swap, dark, bright), np.where(swap, bright, dark)
    blend = ground[:, None, None] + masks[..., None] * (ink - ground)[:, None, None]
    return np.round(255 * blend).astype(np.uint8)


def _hsv(h: NDArray[np.float64], s: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([colorsys.hsv_to_rgb(*hsv) for hsv in zip(h, s, v, strict=True)])  # (N, 3)


def font_folder() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"
