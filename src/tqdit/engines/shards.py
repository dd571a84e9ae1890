"""Many samples on disk: a folder of `.npz` shards and an index, continued from where it stopped.

docs/sampling-many.md describes it for users.

A shard is a whole file of a fixed number of images; the index lists it, with its SHA-256, once it is complete. An
image depends on its number and the job alone, so it does not matter who makes which shard, when, or how often.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tqdit import __version__
from tqdit.card import GraphCard
from tqdit.engines.bundle import MANIFEST, Manifest
from tqdit.engines.images import write_npz
from tqdit.engines.sampler import Callback, Sampler
from tqdit.engines.step_rows import check_guidance, check_labels
from tqdit.errors import FileFormatError, OutputError, UsageError
from tqdit.files import LOCK, check_writable, lock_folder, sha256, whole_file, writing
from tqdit.sampling.noise import check_key

FORMAT_VERSION = 1
INDEX = "shards.json"
SHARD_SIZE = 128  # 25 MB of 256x256 images; a multiple of the default batch
_OURS = re.compile(r"shard-\d{5,}\.npz|\.(shard-\d{5,}\.npz|shards\.json)\.\d+\.partial|shards\.json")

_AGAIN = "Run the same tqdit-sample command again, which mends it."

Arrays = Mapping[str, NDArray[Any]]
Content = Literal["images", "latents"]
# The arrays of a shard, and of the one file that tqdit-sample writes of fewer samples; ADM's evaluator reads the first.
NAMES: dict[Content, tuple[str, str]] = {"images": ("arr_0", "arr_1"), "latents": ("latents", "labels")}


@dataclass(frozen=True)
class SamplingJob:
    """All that the bytes of a sampling run depend on."""

    engine: str  # SHA-256 of the bundle's manifest, which holds those of its parts
    classes: tuple[int, ...]  # cycled
    guidance_scale: float
    seed: int
    count: int  # images in all
    shard_size: int = SHARD_SIZE
    content: Content = "images"

    def __post_init__(self) -> None:
        numbers = (self.seed, self.count, self.shard_size, *self.classes)
        texts = (self.engine, self.content)
        if any(type(number) is not int for number in numbers) or any(type(text) is not str for text in texts):
            raise UsageError("a sampling job is made of whole numbers and texts.")
        if type(self.guidance_scale) is not float or self.content not in NAMES or not self.classes:
            raise UsageError(f"guidance scale {self.guidance_scale}, content '{self.content}' or no classes.")
        if self.count < 1 or self.shard_size < 1:
            raise UsageError(f"{self.count} images in shards of {self.shard_size}; both must be at least 1.")
        check_key(self.seed, self.count - 1)

    @property
    def shards(self) -> int:
        return math.ceil(self.count / self.shard_size)

    def images(self, shard: int) -> range:
        """Numbers of the images in one shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def labels(self, shard: int) -> NDArray[np.int64]:
        """Their classes (n,)."""
        cycle = np.asarray(self.classes, np.int64)
        return cycle.take(np.asarray(self.images(shard)) % len(cycle))

    def make(self, sampler: Sampler, shard: int, callback: Callback | None = None) -> dict[str, NDArray[Any]]:
        """The arrays of one shard: samples and labels, under the names that its file gives them."""
        labels, first = self.labels(shard), self.images(shard).start
        sample = sampler.sample if self.content == "images" else sampler.sample_latents
        samples = sample(labels, self.guidance_scale_for(sampler.card), self.seed, callback, first_image=first)
        return dict(zip(NAMES[self.content], (samples, labels), strict=True))

    def guidance_scale_for(self, card: GraphCard) -> float | None:
        return self.guidance_scale if card.guided else None


def describe_job(
    engine: Path, manifest: Manifest, classes: list[int] | None, guidance_scale: float | None, seed: int, count: int,
    shard_size: int = SHARD_SIZE,
) -> SamplingJob:  # fmt: skip
    """A job for a bundle. classes None: all of the model's, in turn. Raises UsageError for what the model cannot do."""
    card = manifest.card
    return SamplingJob(
        engine=sha256(engine / MANIFEST),
        classes=tuple(check_labels(card, classes or range(card.num_classes)).tolist()),
        guidance_scale=check_guidance(card, guidance_scale),
        seed=seed,
        count=count,
        shard_size=shard_size,
        content="images" if card.latent_scale is None or manifest.decoder else "latents",
    )


class ShardFolder:
    """The shards of one job on disk. One process writes it, which `open_shards` sees to; any number may read."""

    def __init__(self, path: Path, job: SamplingJob, digests: Mapping[str, str]) -> None:
        self.path = path
        self.job = job
        self._digests = dict(digests)

    @property
    def done(self) -> int:
        """Finished shards."""
        return len(self._digests)

    def digest(self, shard: int) -> str | None:
        """SHA-256 of a finished shard; None where it is not done."""
        return self._digests.get(shard_name(shard))

    def pending(self) -> list[int]:
        """Shards that are yet to be made; finished ones that are missing or altered are among them again."""
        for name, digest in list(self._digests.items()):
            if not (self.path / name).is_file() or sha256(self.path / name) != digest:
                del self._digests[name]
        return [shard for shard in range(self.job.shards) if shard_name(shard) not in self._digests]

    def add(self, shard: int, arrays: Arrays) -> None:
        """Write one shard, then list it. Raises OutputError where it cannot be written."""
        file = self.path / shard_name(shard)
        write_npz(file, **arrays)
        self._digests[file.name] = sha256(file)
        self.write_index()

    def read(self, shard: int) -> dict[str, NDArray[Any]]:
        """The arrays of a finished shard. Raises FileFormatError where it is missing, truncated or altered."""
        file, content = self.path / shard_name(shard), self._content(shard)
        names, count = NAMES[self.job.content], len(self.job.images(shard))
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in names}
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise FileFormatError(f"{file}: not a shard ({error}). {_AGAIN}") from error
        if any(len(array) != count for array in found.values()):
            raise FileFormatError(f"{file}: expected {count} samples and labels. {_AGAIN}")
        return found

    def check(self, shard: int) -> None:
        """Raises FileFormatError where a finished shard is missing, truncated or altered."""
        self._content(shard)

    def _content(self, shard: int) -> bytes:
        file = self.path / shard_name(shard)
        try:
            content = file.read_bytes()
        except OSError as error:
            raise FileFormatError(f"{file}: cannot be read ({error.strerror}). {_AGAIN}") from error
        if hashlib.sha256(content).hexdigest() != self.digest(shard):
            raise FileFormatError(f"{file}: truncated or altered (its SHA-256 differs). {_AGAIN}")
        return content

    def write_index(self) -> None:
        values = {
            "format_version": FORMAT_VERSION,
            "written_by": __version__,
            "job": asdict(self.job),
            "shards": dict(sorted(self._digests.items())),
        }
        with whole_file(self.path / INDEX) as temporary:
            temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.npz"


@contextmanager
def open_shards(path: Path, job: SamplingJob, force: bool = False) -> Iterator[ShardFolder]:
    """The folder of a job, new or continued, for this process alone.

    Raises OutputError where another process writes it, where it holds shards of another job (force: they are removed)
    or anything else.
    """
    check_writable(path)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is a file. Choose another name.")
    with lock_folder(path):
        with writing(path):
            foreign = sorted(entry.name for entry in path.iterdir() if not _is_ours(entry.name))
        if foreign:
            raise OutputError(f"{path}: holds '{foreign[0]}', which is no shard of samples. Choose another name.")
        if force:
            _clear(path)
        folder = _continued(path, job)
        folder.write_index()
        yield folder


def _is_ours(name: str) -> bool:
    return name == LOCK or _OURS.fullmatch(name) is not None


def _clear(path: Path) -> None:
    with writing(path):
        (path / INDEX).unlink(missing_ok=True)  # first: shards that no index lists are never taken for finished
        for entry in path.iterdir():
            if entry.name != LOCK:
                entry.unlink()


def _continued(path: Path, job: SamplingJob) -> ShardFolder:
    if not (path / INDEX).is_file():
        return ShardFolder(path, job, {})
    folder = read_index(path)
    if folder.job != job:
        there, asked = asdict(folder.job), asdict(job)
        differences = ", ".join(
            f"{name} {_short(there[name])} (asked for {_short(asked[name])})"
            for name in there
            if there[name] != asked[name]
        )
        raise OutputError(
            f"{path}: holds samples of another run: {differences}. Choose another folder, or --force to start anew."
        )
    return folder


def _short(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."


def read_index(path: Path) -> ShardFolder:
    """What a folder says of itself; its shards are not looked at. Raises FileFormatError where it is damaged."""
    index = path / INDEX
    if not index.is_file():
        raise FileFormatError(f"{path}: not a folder of shards (it has no {INDEX}). Write it with tqdit-sample -o.")
    try:
        return parse_index(index.read_text(encoding="utf-8"), path)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{index}: cannot be read ({error}). Start anew with --force.") from error


def parse_index(text: str, path: Path) -> ShardFolder:
    """The content of the index of folder `path`."""
    index = path / INDEX
    try:
        values = json.loads(text)
        version = values["format_version"]
        if version == FORMAT_VERSION:
            job = SamplingJob(**values["job"] | {"classes": tuple(values["job"]["classes"])})
            digests = {str(name): str(digest) for name, digest in values["shards"].items()}
            if not all(_is_shard(name, job) for name in digests):
                raise ValueError("it lists files that are no shards of this job")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise FileFormatError(f"{index}: damaged ({error!r}). Start anew with --force.") from error
    if version != FORMAT_VERSION:
        raise FileFormatError(
            f"{index}: written in format {version}, this tqdit reads format {FORMAT_VERSION}. "
            "Choose another folder, or --force to start anew."
        )
    return ShardFolder(path, job, digests)


def _is_shard(name: str, job: SamplingJob) -> bool:
    number = name.removeprefix("shard-").removesuffix(".npz")
    return (
        number.isdecimal()
        and number.isascii()
        and len(number) < 20
        and (shard_name(int(number)) == name and int(number) < job.shards)
    )


def read_shards(path: Path) -> Iterator[dict[str, NDArray[Any]]]:
    """The arrays of one finished shard after the other, in the order of the images: arr_0 uint8 (n, H, W, 3) and arr_1
    int64 (n,), or latents float32 (n, C, H, W) and labels. Each file is checked before it is used.

    Raises FileFormatError where shards are unfinished, missing, truncated or altered.
    """
    folder = read_index(path)
    if folder.done < folder.job.shards:
        raise FileFormatError(
            f"{path}: {folder.done} of {folder.job.shards} shards are done. Run the same tqdit-sample command again."
        )
    for shard in range(folder.job.shards):
        yield folder.read(shard)


def merge_shards(path: Path, output: Path) -> None:
    """One `.npz` of all samples, byte for byte what one run with `-o output` writes; a shard is in memory at a time."""
    job = read_index(path).job
    samples, labels = NAMES[job.content]
    with whole_file(output) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(f"{samples}.npy", "w", force_zip64=True) as file:
            for number, arrays in enumerate(read_shards(path)):
                if number == 0:
                    file.write(_header(arrays[samples], job.count))
                file.write(arrays[samples].tobytes())
        with archive.open(f"{labels}.npy", "w", force_zip64=True) as file:
            every = np.concatenate([job.labels(shard) for shard in range(job.shards)])
            np.lib.format.write_array(file, every, allow_pickle=False)


def _header(first: NDArray[Any], count: int) -> bytes:
    """The head of an .npy file of `count` rows like those of `first`."""
    head = io.BytesIO()
    facts = np.lib.format.header_data_from_array_1_0(first) | {"shape": (count, *first.shape[1:])}
    np.lib.format.write_array_header_1_0(head, facts)
    return head.getvalue()
