"""Samples on disk: a PNG grid, a folder of PNGs, the `.npz` of the ADM evaluator, or of videos a .gif or .mp4.

Always whole or not at all.
"""

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
from tqdit.extras import need
from tqdit.files import check_only, whole_file, whole_folder

NOTES = "samples.json"  # in a folder of PNGs: how they were made
SMALL_IMAGE = 64  # images below this width are enlarged in a grid
_OURS = re.compile(rf"\d{{6,}}\.(png|gif)|{re.escape(NOTES)}")  # names in such a folder
VIDEOS = ("gif", "mp4")  # suffixes
FRAMES_PER_S = 16
GAP = 2  # pixels between the images of a grid


def kind_of(path: Path) -> str:
    """'png', 'npz', 'gif', 'mp4' or 'folder', by the suffix."""
    suffix = path.suffix.lower()
    if suffix[1:] in ("png", "npz", *VIDEOS):
        return suffix[1:]
    if suffix and not path.is_dir():
        raise UsageError(f"{path}: unknown kind of output '{suffix}'. Name a .png, .npz, .gif or .mp4, or a folder.")
    return "folder"


def check_output(path: Path, is_video: bool = False) -> None:
    """Refuse to replace a folder that holds anything but earlier samples, and a video's file for pictures."""
    if kind_of(path) in VIDEOS and not is_video:
        raise OutputError(f"{path}: the engine makes pictures, not videos. Name a .png, a .npz or a folder.")
    if kind_of(path) == "mp4":
        need("av", "video", "writing .mp4")
    if kind_of(path) == "folder":
        has_notes = (path / NOTES).is_file()
        check_only(path, lambda name: has_notes and _OURS.fullmatch(name), "samples")
    elif path.is_dir():
        raise OutputError(f"{path}: is a folder. Choose another name.")


def write_images(
    path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64] | None, notes: dict[str, Any],
    frames_per_s: int = FRAMES_PER_S,
) -> None:  # fmt: skip
    """Write images uint8 (N, H, W, 3), or videos (N, F, H, W, 3), in the form that the suffix of `path` asks for.

    labels: None: there are none. frames_per_s: of .gif and .mp4, which show all videos side by side; a .png has a row
    of frames for each.
    """
    kind = kind_of(path)
    if kind == "png":
        with whole_file(path) as temporary:
            grid(images).save(temporary, format="PNG")
    elif kind in VIDEOS:
        with whole_file(path) as temporary:
            _WRITERS[kind](temporary, [grid(frame) for frame in images.swapaxes(0, 1)], frames_per_s)
    elif kind == "npz":
        arrays = {"arr_0": images} | ({} if labels is None else {"arr_1": labels})  # as the ADM evaluator reads
        write_npz(path, **arrays)
    else:
        with whole_folder(path, check_output) as folder:
            for index, image in enumerate(images):
                if image.ndim == 4:
                    _write_gif(folder / f"{index:06d}.gif", [*map(Image.fromarray, image)], frames_per_s)
                else:
                    Image.fromarray(image).save(folder / f"{index:06d}.png")
            classes = {} if labels is None else {"classes": labels.tolist()}
            (folder / NOTES).write_text(json.dumps(notes | classes, indent=1) + "\n")


def write_npz(path: Path, **arrays: NDArray[Any]) -> None:
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # the stubs take every keyword for allow_pickle


def grid(images: NDArray[np.uint8]) -> Image.Image:
    """A nearly square sheet, or a row of frames for each video; small images are enlarged for people to see them."""
    columns = images.shape[1] if images.ndim == 5 else math.ceil(math.sqrt(len(images)))
    images = images.reshape(-1, *images.shape[-3:])
    count, height, width, _ = images.shape
    factor = max(1, SMALL_IMAGE // width)
    rows = math.ceil(count / columns)
    sheet = np.full(((height * factor + GAP) * rows - GAP, (width * factor + GAP) * columns - GAP, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height * factor + GAP), index % columns * (width * factor + GAP)
        large = image.repeat(factor, axis=0).repeat(factor, axis=1)
        sheet[top : top + height * factor, left : left + width * factor] = large
    return Image.fromarray(sheet)


def _write_gif(path: Path, frames: list[Image.Image], frames_per_s: int) -> None:
    """One palette for each frame; it is repeated without end."""
    first, *others = frames
    first.save(path, format="GIF", save_all=True, append_images=others, duration=round(1000 / frames_per_s), loop=0)


def _write_mp4(path: Path, frames: list[Image.Image], frames_per_s: int) -> None:
    """H.264 if the library has it, else MPEG-4; an odd height or width loses a line, as both need even ones."""
    av: Any = need("av", "video", "writing .mp4")
    with av.open(str(path), "w", format="mp4") as file:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = file.add_stream(codec, rate=frames_per_s)
        stream.width, stream.height = (size - size % 2 for size in frames[0].size)
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            even = frame.crop((0, 0, stream.width, stream.height))
            file.mux(stream.encode(av.VideoFrame.from_image(even)))
        file.mux(stream.encode())


_WRITERS = {"gif": _write_gif, "mp4": _write_mp4}
