"""Many samples on disk: a folder of `.npz` shards and an index, continued from where it stopped.

docs/sampling-many.md describes it for users.

A shard is one file with a fixed number of images. The index lists it, with its SHA-256, when it is complete. An image
depends only on its number and the job, so any process may make any shard, at any time and more than once.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Unpack

import msgspec
import numpy as np
from numpy.typing import NDArray

from tqdit.bounds import MOST_SHARDS, check_disk, check_memory
from tqdit.card import GraphCard
from tqdit.engines.bundle import MANIFEST, Manifest
from tqdit.engines.run.images import write_npz
from tqdit.engines.run.requests import Prompts, PromptSource
from tqdit.engines.run.sampler import Callback, Sampler, bytes_per_image, makes_images
from tqdit.errors import FileFormatError, OutputError, UsageError
from tqdit.files import (
    JSON,
    LOCK,
    NPZ,
    NPZ_ERRORS,
    check_only,
    check_writable,
    decode_record,
    lock_folder,
    parse_npz,
    reading,
    sha256,
    whole_file,
    writing,
)  # fmt: skip
from tqdit.ports import Requests, check_requests
from tqdit.sampling.guidance import check_scale
from tqdit.sampling.noise import check_key
from tqdit.sampling.schedule import ChainArguments, arguments_of
from tqdit.version import __version__

FORMAT_VERSION = 3
INDEX = "shards.json"
SHARD_SIZE = 128  # 25 MB of 256x256 images; a multiple of the default batch
_SHARD = re.compile(r"shard-(\d{5,19})\.npz", re.ASCII)
# Names in a folder of shards; without an index, shards are somebody else's.
_LEFT_OVER = re.compile(r"\.lock|\.(shard-\d{5,}\.npz|shards\.json)\.\d+\.partial")
_OURS = re.compile(rf"shard-\d{{5,}}\.npz|shards\.json|{_LEFT_OVER.pattern}")

_AGAIN = "Run the same tqdit-sample command again; it replaces the file."
_ANEW = "Choose another folder, or start anew: tqdit-sample --force."

Arrays = Mapping[str, NDArray[Any]]
Content = Literal["images", "latents"]
# The arrays of a shard, and of the one file that tqdit-sample writes of fewer samples; ADM's evaluator reads the first.
NAMES: dict[Content, tuple[str, str]] = {"images": ("arr_0", "arr_1"), "latents": ("latents", "labels")}


@dataclass(frozen=True)
class SamplingJob:
    """Everything that the bytes of a sampling run depend on. Raises UsageError for values that no run can have."""

    engine: str  # SHA-256 of the bundle's manifest, which holds those of its parts
    steps: int
    sampler: str
    classes: tuple[int, ...]  # of the images in turn, repeated as often as necessary; empty: an unconditional model
    guidance_scale: float | None  # None: a model that is sampled without guidance
    seed: int
    count: int  # images in all
    shard_size: int = SHARD_SIZE
    content: Content = "images"
    prompts: PromptSource | None = None  # of the images in turn; None: a model that takes a class, or nothing
    timesteps: tuple[float, ...] = ()  # where the steps lie; (): where the sampler puts them
    guidance_interval: tuple[float, float] | None = None  # lowest and highest timestep with guidance; None: all
    full_calls: tuple[int, ...] = ()  # steps with a full call, the others being forecasts; (): all are full

    def __post_init__(self) -> None:
        if self.count < 1 or self.shard_size < 1:
            raise UsageError(f"{self.count} images in shards of {self.shard_size}; both must be at least 1.")
        if self.steps < 1:
            raise UsageError(f"{self.steps} steps of {self.sampler}; expected at least 1.")
        check_key(self.seed, self.count - 1)

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def images(self, shard: int) -> range:
        """The numbers of the images in one shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def labels(self, shard: int) -> NDArray[np.int64] | None:
        """The classes (n,) of the images in one shard, or the numbers of their prompts; None if there are none."""
        cycle = np.asarray(self.classes or range(self.prompts.count if self.prompts else 0), np.int64)
        if not len(cycle):
            return None
        return cycle.take(np.asarray(self.images(shard)) % len(cycle))

    def requests(self, shard: int, prompts: Prompts | None = None) -> Requests:
        """What the images of one shard ask for. prompts: those that the job was described with."""
        labels = self.labels(shard)
        if labels is None:
            return len(self.images(shard))
        return labels if prompts is None else prompts.take(labels)

    @property
    def chain(self) -> ChainArguments:
        """What `Sampler.sample` takes of the chain."""
        return arguments_of(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays of a shard."""
        return NAMES[self.content] if self.classes or self.prompts else NAMES[self.content][:1]

    def make(
        self, sampler: Sampler, shard: int, callback: Callback | None = None, prompts: Prompts | None = None
    ) -> dict[str, NDArray[Any]]:
        """The arrays of one shard, under the names that its file gives them: samples and, if there are any, labels.

        prompts: those that the job was described with.
        """
        labels, images = self.labels(shard), self.images(shard)
        sample = sampler.sample if self.content == "images" else sampler.sample_latents
        samples = sample(
            self.requests(shard, prompts), self.guidance_scale, self.seed, callback, first_image=images.start,
            **self.chain,
        )  # fmt: skip
        return {name: array for name, array in zip(self.names, (samples, labels), strict=False) if array is not None}


def describe_job(
    engine: Path, manifest: Manifest, shown: list[int] | Prompts | None, seed: int, count: int,
    shard_size: int = SHARD_SIZE, *, guidance_scale: float | None = None, **chain: Unpack[ChainArguments],
) -> SamplingJob:  # fmt: skip
    """A job for a bundle. shown: classes or prompts, in turn; None: all classes of the model. guidance_scale, chain: as
    for `Sampler.sample`. Raises UsageError for what the model cannot do.
    """
    card = manifest.card
    scale = check_scale(card.guidance, guidance_scale)
    spec = card.choose(manifest.batch is None, **chain)
    at_once = min(count, shard_size)
    check_memory(f"{at_once} images at once", at_once * bytes_per_image(card)[0], "Take fewer, or write shards.")
    prompts = shown if isinstance(shown, Prompts) else None
    return SamplingJob(
        engine=sha256(engine / MANIFEST),
        steps=spec.steps,
        sampler=spec.sampler,
        classes=() if isinstance(shown, Prompts) else _classes(card, shown),
        guidance_scale=None if card.guidance is None else scale,
        seed=seed,
        count=count,
        shard_size=shard_size,
        content="images" if makes_images(manifest) else "latents",
        prompts=None if prompts is None else prompts.source,
        timesteps=spec.timesteps,
        guidance_interval=spec.guidance_interval,
        full_calls=spec.full_calls,
    )


def _classes(card: GraphCard, chosen: list[int] | None) -> tuple[int, ...]:
    """The classes to repeat; none for an unconditional model."""
    signature = card.signature
    label = signature.label
    if label is not None:
        labels = check_requests(signature, chosen or range(label.choices or 0))[1][label.name]
        return tuple(labels.tolist())
    if card.text is not None:
        raise UsageError(
            "images of this engine show prompts, not classes. Pass --prompt TEXT, --prompts FILE or --embeddings FILE."
        )
    if signature.requests:
        ports = ", ".join(f"'{name}' {list(port.row_shape)}" for name, port in signature.request_values.items())
        raise UsageError(
            f"{signature.family} takes {ports} of each prompt, which are not classes. Pass --embeddings FILE, or in "
            "Python a dict of arrays to Sampler.sample."
        )
    if chosen is not None:
        raise UsageError(f"{signature.family} is unconditional and takes no --classes. Leave it out.")
    return ()


@dataclass(frozen=True)
class _Index:
    """The content of the index file."""

    format_version: int
    written_by: str
    job: SamplingJob
    shards: dict[str, str]  # name of a finished shard -> its SHA-256


class ShardFolder:
    """The shards of one job on disk. `open_shards` makes sure that one process writes it; any number may read."""

    def __init__(self, path: Path, job: SamplingJob, digests: Mapping[str, str]) -> None:
        self.path = path
        self.job = job
        self._digests = dict(digests)

    @property
    def done(self) -> int:
        """Finished shards."""
        return len(self._digests)

    def digest(self, shard: int) -> str | None:
        """SHA-256 of a finished shard; None if it is not finished."""
        return self._digests.get(shard_name(shard))

    def pending(self) -> list[int]:
        """Shards to make: those that are not finished, and finished ones whose file is missing or altered."""
        for name, digest in list(self._digests.items()):
            if not (self.path / name).is_file() or sha256(self.path / name) != digest:
                del self._digests[name]
        return [shard for shard in range(self.job.shards) if shard_name(shard) not in self._digests]

    def add(self, shard: int, arrays: Arrays) -> None:
        """Write one shard, then list it. Raises OutputError if it cannot be written."""
        file = self.path / shard_name(shard)
        write_npz(file, **arrays)
        self._digests[file.name] = sha256(file)
        self.write_index()

    def read(self, shard: int) -> dict[str, NDArray[Any]]:
        """The arrays of a finished shard. Raises FileFormatError if it is missing, truncated or altered."""
        file, content = self.path / shard_name(shard), self.check(shard)
        names, count = self.job.names, len(self.job.images(shard))
        with reading(file, NPZ, _AGAIN, *NPZ_ERRORS):
            arrays = parse_npz(str(file), io.BytesIO(content))
            found = {name: arrays[name] for name in names}
        if any(len(array) != count for array in found.values()):
            raise FileFormatError(f"{file}: expected {count} of each array. {_AGAIN}")
        return found

    def check(self, shard: int) -> bytes:
        """The content of a finished shard's file. Raises FileFormatError if it is missing, truncated or altered."""
        file = self.path / shard_name(shard)
        with reading(file, NPZ, _AGAIN):
            content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.digest(shard):
            raise FileFormatError(f"{file}: truncated or altered (its SHA-256 differs). {_AGAIN}")
        return content

    def write_index(self) -> None:
        index = _Index(FORMAT_VERSION, __version__, self.job, dict(sorted(self._digests.items())))
        with whole_file(self.path / INDEX) as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(index), indent=1) + b"\n")


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.npz"


@contextmanager
def open_shards(path: Path, job: SamplingJob, force: bool = False, image_bytes: int = 0) -> Iterator[ShardFolder]:
    """The folder of a job, new or continued. This process is its only writer.

    image_bytes: of an image on the disk, for which there must be room. Raises OutputError if there is none, if another
    process writes the folder, if it holds shards of another job (force: they are removed), or any other file.
    """
    if job.shards > MOST_SHARDS:
        raise UsageError(
            f"{job.count} images in shards of {job.shard_size} are {job.shards} shards, a folder holds at most "
            f"{MOST_SHARDS}. Pass a larger --shard-size, or fewer images."
        )
    check_writable(path)
    with lock_folder(path):
        check_only(path, _OURS.fullmatch if (path / INDEX).is_file() else _LEFT_OVER.fullmatch, "shards of samples")
        if force:
            _clear(path)
        folder = _continued(path, job)
        left = (job.shards - folder.done) * min(job.shard_size, job.count)
        check_disk(path, left * image_bytes, "Take fewer images, or another disk.")
        folder.write_index()
        yield folder


def _clear(path: Path) -> None:
    with writing(path):
        for entry in sorted(path.iterdir(), key=lambda entry: entry.name == INDEX):  # last: it tells whose they are
            if entry.name != LOCK:
                entry.unlink()


def _continued(path: Path, job: SamplingJob) -> ShardFolder:
    if not (path / INDEX).is_file():
        return ShardFolder(path, job, {})
    folder = read_index(path)
    if folder.job != job:
        differences = ", ".join(
            f"{one.name} {_short(there)} (asked for {_short(asked)})"
            for one in fields(job)
            if one.compare and (there := getattr(folder.job, one.name)) != (asked := getattr(job, one.name))
        )
        raise OutputError(f"{path}: holds samples of another run: {differences}. {_ANEW}")
    return folder


def _short(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple) and value else str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."


def read_index(path: Path) -> ShardFolder:
    """What the index of a folder says; the shards are not read. Raises FileFormatError if it is missing or damaged."""
    file = path / INDEX
    if not file.is_file():
        raise FileFormatError(f"{path}: not a folder of shards (it has no {INDEX}). Write it with tqdit-sample -o.")
    with reading(file, JSON, _ANEW):
        content = file.read_bytes()
    index = decode_record(content, _Index, FORMAT_VERSION, str(file), _ANEW)
    for name in index.shards:
        if not _is_shard(name, index.job):
            raise FileFormatError(f"{file}: lists '{name}', which is not a shard of this job. {_ANEW}")
    return ShardFolder(path, index.job, index.shards)


def _is_shard(name: str, job: SamplingJob) -> bool:
    match = _SHARD.fullmatch(name)
    return match is not None and int(match[1]) < job.shards and shard_name(int(match[1])) == name


def read_shards(path: str | Path) -> Iterator[dict[str, NDArray[Any]]]:
    """The arrays of one shard after another, in the order of the images: arr_0 uint8 (n, H, W, 3) and arr_1 int64 (n,),
    or latents float32 (n, C, H, W) and labels. The SHA-256 of each file is checked.

    Raises FileFormatError if shards are unfinished, missing, truncated or altered.
    """
    folder = read_index(Path(path))
    if folder.done < folder.job.shards:
        raise FileFormatError(
            f"{path}: {folder.done} of {folder.job.shards} shards are done. Run the same tqdit-sample command again."
        )
    for shard in range(folder.job.shards):
        yield folder.read(shard)


def merge_shards(path: Path, output: Path) -> None:
    """Write all samples to one `.npz`, the same bytes as one run with `-o output`. One shard at a time is in memory."""
    job = read_index(path).job
    samples = job.names[0]
    with whole_file(output) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(f"{samples}.npy", "w", force_zip64=True) as file:
            for number, arrays in enumerate(read_shards(path)):
                if number == 0:
                    file.write(_header(arrays[samples], job.count))
                file.write(arrays[samples].tobytes())
        labels = replace(job, shard_size=job.count).labels(0)
        if labels is not None:
            with archive.open(f"{job.names[1]}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, labels, allow_pickle=False)


def _header(first: NDArray[Any], count: int) -> bytes:
    """The header of an .npy file with `count` rows like those of `first`."""
    head = io.BytesIO()
    facts = np.lib.format.header_data_from_array_1_0(first) | {"shape": (count, *first.shape[1:])}
    np.lib.format.write_array_header_1_0(head, facts)
    return head.getvalue()
