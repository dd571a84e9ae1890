"""Images and references from files: an `.npz`, a folder of pictures or of shards, or stored statistics."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tqdit.bounds import check_memory
from tqdit.engines.run.images import NOTES, write_npz
from tqdit.engines.run.shards import INDEX, ShardFolder, read_index, shard_name
from tqdit.errors import FileFormatError, UsageError
from tqdit.evaluate.statistics import Gaussian
from tqdit.files import JSON, PICTURE, read_npz, reading

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SHOWN = 16  # images in a report


@dataclass(frozen=True, eq=False)
class Images:
    """uint8 (N, H, W, 3) and, if they are known, the classes that were asked for (N,)."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    source: str

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, 3)."""
        return self.pixels.shape[1:]

    @property
    def shown(self) -> NDArray[np.uint8]:
        """The first few, for a report."""
        return self.pixels[:SHOWN]

    def first(self, count: int | None) -> Images:
        """The first `count` of them, or all."""
        if count is None:
            return self
        if count > len(self):
            raise UsageError(f"{self.source}: holds {len(self)} images, -n asks for {count}. Sample more.")
        return Images(self.pixels[:count], None if self.labels is None else self.labels[:count], self.source)


@dataclass(frozen=True, eq=False)
class ShardImages:
    """The first `count` images of a folder of shards. Their pixels stay on the disk until a shard is asked for."""

    folder: ShardFolder
    count: int
    source: str
    shape: tuple[int, ...]  # (H, W, 3)

    def __len__(self) -> int:
        return self.count

    @property
    def shown(self) -> NDArray[np.uint8]:
        few = self.shards[: math.ceil(SHOWN / self.folder.job.shard_size)]
        return np.concatenate([self.pixels(shard)[:SHOWN] for shard in few])[:SHOWN]  # no view of a whole shard

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """(N,), as the job assigned them; None for an unconditional model."""
        parts = [self.folder.job.labels(shard) for shard in self.shards]
        return None if parts[0] is None else np.concatenate([part for part in parts if part is not None])[: self.count]

    @property
    def shards(self) -> range:
        return range(math.ceil(self.count / self.folder.job.shard_size))

    def is_whole(self, shard: int) -> bool:
        """Whether all images of this shard are among the first `count`."""
        return self.folder.job.images(shard).stop <= self.count

    def pixels(self, shard: int) -> NDArray[np.uint8]:
        """Those of one shard (n, H, W, 3), checked by its SHA-256."""
        pixels = _pixels(self.folder, shard)
        if pixels.shape[1:] != self.shape:
            (h, w), (h0, w0) = pixels.shape[1:3], self.shape[:2]
            file = self.folder.path / shard_name(shard)
            raise FileFormatError(f"{file}: {w}x{h} pixels, the first shard has {w0}x{h0}. All must be of one size.")
        return pixels[: self.count - self.folder.job.images(shard).start]


AnyImages = Images | ShardImages


@dataclass(frozen=True, eq=False)
class Reference:
    """What samples are compared with. Any part may be missing; the pooled statistics of ADM's files have no images."""

    source: str
    images: AnyImages | None = None
    pooled: Gaussian | None = None
    spatial: Gaussian | None = None
    extractor: str | None = None  # "name digest", if the file says so


def read_images(path: Path, count: int | None = None) -> AnyImages:
    """Images of an `.npz` (arr_0, arr_1 as the ADM evaluator names them), a folder of pictures or one of shards: the
    first `count`, or all."""
    if (path / INDEX).is_file():
        return _shards(path, count, advise=True)
    if path.is_dir():
        return _folder(path).first(count)
    content = _arrays(path)
    if "arr_0" not in content:
        held = ", ".join(sorted(content)) or "nothing"
        advice = "Export with --vae DIR to sample images" if "latents" in content else "Write it with tqdit-sample -o"
        raise FileFormatError(f"{path}: holds {held}, expected images uint8 (N, H, W, 3) under 'arr_0'. {advice}.")
    return _images(content, path).first(count)


def read_reference(path: Path) -> Reference:
    """Samples (arr_0), stored statistics (mu, sigma, mu_s, sigma_s), or both, as in ADM's reference batches."""
    if (path / INDEX).is_file():
        return Reference(str(path), _shards(path, None, advise=False))
    if path.is_dir():
        return Reference(str(path), _folder(path))
    content = _arrays(path)
    images = _images(content, path) if "arr_0" in content else None
    pooled, spatial = (_gaussian(content, path, suffix) for suffix in ("", "_s"))
    if images is None and pooled is None:
        raise FileFormatError(
            f"{path}: holds {', '.join(sorted(content)) or 'nothing'}, expected samples (arr_0) or statistics (mu, "
            "sigma). Write one with --write-reference."
        )
    extractor = str(content["extractor"]) if "extractor" in content else None
    return Reference(str(path), images, pooled, spatial, extractor)


def write_reference(path: Path, pooled: Gaussian, spatial: Gaussian | None, extractor: str, count: int) -> None:
    """Statistics for later runs, with the extractor that made them."""
    arrays: dict[str, NDArray[Any]] = {
        "mu": pooled.mean, "sigma": pooled.covariance, "extractor": np.array(extractor), "count": np.array(count)
    }  # fmt: skip
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    write_npz(path, **arrays)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise UsageError(
            f"{path}: no such file or folder. Pass an .npz, a folder of images or of shards, or an engine."
        )
    return read_npz(path)


def _images(content: dict[str, NDArray[Any]], path: Path) -> Images:
    pixels = content["arr_0"]
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3) or pixels.dtype != np.uint8 or not len(pixels):
        raise FileFormatError(
            f"{path}: arr_0 is {pixels.dtype} {pixels.shape}, expected images uint8 (N, H, W, 3), or (N, H, W, 1) if "
            "they are grey. Write it with tqdit-sample -o FILE.npz."
        )
    pixels = np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:3], 3)))
    labels = content.get("arr_1")
    if labels is not None and labels.shape != (len(pixels),):
        raise FileFormatError(f"{path}: {labels.shape} labels (arr_1) for {len(pixels)} images. Write it again.")
    return Images(pixels, None if labels is None else labels.astype(np.int64), str(path))


def _folder(path: Path) -> Images:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
    if not files:
        raise FileFormatError(f"{path}: holds no images ({', '.join(PICTURES)}). Pass another folder.")
    pictures: list[NDArray[np.uint8]] = []
    for file in files:
        damage = (Image.DecompressionBombError, UnidentifiedImageError, SyntaxError, ValueError)
        with reading(file, PICTURE, "Remove it.", *damage), Image.open(file) as picture:
            (w, h), (h0, w0) = picture.size, pictures[0].shape[:2] if pictures else picture.size[::-1]
            if (w, h) != (w0, h0):
                raise FileFormatError(
                    f"{file}: {w}x{h} pixels, the images before it have {w0}x{h0}. All must be of one size."
                )
            if not pictures:
                check_memory(str(path), 3 * w * h * len(files), "Pass fewer images, or shards.")
            pictures.append(np.asarray(picture.convert("RGB")))
    return Images(np.stack(pictures), _labels(path, len(pictures)), str(path))


def _shards(path: Path, count: int | None, advise: bool) -> ShardImages:
    """The first `count` images of a job, which are finished, or all of them. advise: the command has -n for these."""
    folder = read_index(path)
    job = folder.job
    if job.content != "images":
        raise FileFormatError(f"{path}: holds latents, expected images. Export with --vae DIR to sample images.")
    if count is not None and count > job.count:
        raise UsageError(f"{path}: holds {job.count} images, -n asks for {count}. Sample more.")
    wanted = job.count if count is None else count
    finished = list(itertools.takewhile(lambda shard: folder.digest(shard) is not None, range(job.shards)))
    ready = job.images(finished[-1]).stop if finished else 0
    if wanted > ready:
        other = f", or pass -n {ready} for those that are ready" if advise and ready else ""
        raise FileFormatError(
            f"{path}: {folder.done} of {job.shards} shards are done. Run the same tqdit-sample command again{other}."
        )
    needed = finished[: math.ceil(wanted / job.shard_size)]
    missing = [file for shard in needed if not (file := path / shard_name(shard)).is_file()]
    if missing:  # as after a copy that was cut short; better said before hours of work
        raise FileFormatError(
            f"{missing[0]}: no such file, but {INDEX} lists it. Copy the whole folder, or run the same tqdit-sample "
            "command again."
        )
    return ShardImages(folder, wanted, str(path), _pixels(folder, 0).shape[1:])


def _pixels(folder: ShardFolder, shard: int) -> NDArray[np.uint8]:
    return _images(folder.read(shard), folder.path / shard_name(shard)).pixels


def _labels(path: Path, count: int) -> NDArray[np.int64] | None:
    """Those that tqdit-sample noted beside its pictures."""
    notes = path / NOTES
    if not notes.is_file():
        return None
    with reading(notes, JSON, "Sample again.", ValueError, TypeError, RecursionError):
        classes = json.loads(notes.read_text(encoding="utf-8")).get("classes")
        if classes is None:  # of an unconditional model
            return None
        labels = np.asarray(classes, dtype=np.int64)
    if labels.shape != (count,):
        raise FileFormatError(f"{notes}: names {labels.size} classes for {count} images. Sample again.")
    return labels


def _gaussian(content: dict[str, NDArray[Any]], path: Path, suffix: str) -> Gaussian | None:
    names = (f"mu{suffix}", f"sigma{suffix}")
    found = [name for name in names if name in content]
    if not found:
        return None
    if len(found) == 1:
        raise FileFormatError(f"{path}: holds {found[0]} without its partner, expected {' and '.join(names)}.")
    mean, covariance = (np.asarray(content[name], np.float64) for name in names)
    try:
        return Gaussian(np.atleast_1d(mean), np.atleast_2d(covariance))
    except UsageError as error:
        raise FileFormatError(f"{path}: {names[0]}, {names[1]}: {error}") from error
