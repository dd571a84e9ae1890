"""Samples on disk: a PNG grid, a folder of PNGs, or the `.npz` of the ADM evaluator. Always whole or not at all."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tqdit.errors import OutputError, UsageError
from tqdit.files import check_only, whole_file, whole_folder

NOTES = "samples.json"  # in a folder of PNGs: how they were made
SMALL_IMAGE = 64  # images below this width are enlarged in a grid
_OURS = re.compile(rf"\d{{6,}}\.png|{re.escape(NOTES)}")  # names in such a folder
GAP = 2  # pixels between the images of a grid


def kind_of(path: Path) -> str:
    """'png', 'npz' or 'folder', by the suffix."""
    suffix = path.suffix.lower()
    if suffix in (".png", ".npz"):
        return suffix[1:]
    if suffix and not path.is_dir():
        raise UsageError(f"{path}: unknown kind of output '{suffix}'. Name a .png, a .npz or a folder.")
    return "folder"


def check_output(path: Path) -> None:
    """Refuse to replace a folder that holds anything but earlier samples."""
    if kind_of(path) == "folder":
        has_notes = (path / NOTES).is_file()
        check_only(path, lambda name: has_notes and _OURS.fullmatch(name), "samples")
    elif path.is_dir():
        raise OutputError(f"{path}: is a folder. Choose another name.")


def write_images(
    path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64] | None, notes: dict[str, Any]
) -> None:
    """Write images uint8 (N, H, W, 3) in the form that the suffix of `path` asks for. labels: None: there are none."""
    kind = kind_of(path)
    if kind == "png":
        with whole_file(path) as temporary:
            grid(images).save(temporary, format="PNG")
    elif kind == "npz":
        arrays = {"arr_0": images} | ({} if labels is None else {"arr_1": labels})  # as the ADM evaluator reads
        write_npz(path, **arrays)
    else:
        with whole_folder(path, check_output) as folder:
            for index, image in enumerate(images):
                Image.fromarray(image).save(folder / f"{index:06d}.png")
            classes = {} if labels is None else {"classes": labels.tolist()}
            (folder / NOTES).write_text(json.dumps(notes | classes, indent=1) + "\n")


def write_npz(path: Path, **arrays: NDArray[Any]) -> None:
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # the stubs take every keyword for allow_pickle


def grid(images: NDArray[np.uint8]) -> Image.Image:
    """A nearly square sheet; small images are enlarged so that a person can see them."""
    count, height, width, _ = images.shape
    factor = max(1, SMALL_IMAGE // width)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full(((height * factor + GAP) * rows - GAP, (width * factor + GAP) * columns - GAP, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height * factor + GAP), index % columns * (width * factor + GAP)
        large = image.repeat(factor, axis=0).repeat(factor, axis=1)
        sheet[top : top + height * factor, left : left + width * factor] = large
    return Image.fromarray(sheet)
