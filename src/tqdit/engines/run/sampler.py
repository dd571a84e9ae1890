"""The runtime: loop a step engine over the timesteps. NumPy and one backend, no torch, no global state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.card import GraphCard
from tqdit.engines.bundle import check_parts, read_manifest
from tqdit.engines.config import BatchRange
from tqdit.engines.run.backend import Engine, runner
from tqdit.engines.run.step_rows import StepRows, check_guidance, check_labels
from tqdit.errors import FileFormatError, SamplingStopped, UsageError

DEFAULT_BATCH = 16
Labels = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class StepReport:
    """What a callback is told after every step."""

    step: int  # that has just been computed; 0 is the last of a chain
    steps: int  # of a chain
    images: range  # indices of the images in this batch
    x: NDArray[np.float32]  # (B, C, H, W), a copy of their state


Callback = Callable[[StepReport], bool | None]


class Sampler:
    """Samples images with one engine bundle. Thread-safe: every call keeps its state to itself.

        with Sampler.open("model.engine") as sampler:
            images = sampler.sample([0, 1, 2], seed=7)  # uint8 (3, H, W, 3)

    An image depends on (engine, seed, its index, class, guidance scale) and on nothing else.
    """

    def __init__(self, card: GraphCard, step: Engine, decoder: Engine | None = None, batch: int = 16) -> None:
        if card.graph != "step":
            raise UsageError("this engine holds a denoiser graph; sampling needs tqdit-export --graph step.")
        if batch < 1:
            raise UsageError(f"batch is {batch}; it must be at least 1.")
        self.card = card
        self.batch = batch
        self._step: Engine | None = step
        self._decoder = decoder

    @classmethod
    def open(cls, path: str | Path, *, batch: int | None = None, threads: int | None = None) -> Sampler:
        """Open a bundle that tqdit-build wrote, after checking every file of it.

        batch: images per engine call at most; None: 16, or fewer where the engine was built for fewer. threads: CPU
        threads per call; None leaves it to the backend.
        Raises FileFormatError for a damaged bundle, BackendError where it cannot run here.
        """
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}; it must be at least 1.")
        folder = Path(path)
        manifest = read_manifest(folder)
        check_parts(folder, manifest)
        batch = choose_batch(folder, manifest.batch, batch)
        backend = runner(manifest.backend)
        step = backend.load(folder, manifest, manifest.entry, threads)
        decoder = backend.load(folder, manifest, manifest.decoder, threads) if manifest.decoder else None
        return cls(manifest.card, step, decoder, batch)

    @property
    def makes_images(self) -> bool:
        """False for a latent model without a decoder, which has only `sample_latents`."""
        return self.card.latent_scale is None or self._decoder is not None

    def _check_makes_images(self) -> None:
        """Refuse a latent model without a decoder."""
        if not self.makes_images:
            raise UsageError(
                "this engine makes latents and has no decoder. Use sample_latents, or export again with --vae DIR."
            )

    def sample(
        self,
        class_labels: Labels,
        guidance_scale: float | None = None,
        seed: int = 0,
        callback: Callback | None = None,
        *,
        first_image: int = 0,
    ) -> NDArray[np.uint8]:
        """One image per label: uint8 (N, H, W, 3).

        class_labels: ints in 0..num_classes (the last one is unconditional). guidance_scale None: the engine's
        default. callback: called after every step; returning True stops with SamplingStopped. first_image: index of
        the first image; image i of one call equals image 0 of a call with first_image=i.
        """
        self._check_makes_images()
        latents = self.sample_latents(class_labels, guidance_scale, seed, callback, first_image=first_image)
        return self.to_images(latents)

    def sample_latents(
        self,
        class_labels: Labels,
        guidance_scale: float | None = None,
        seed: int = 0,
        callback: Callback | None = None,
        *,
        first_image: int = 0,
    ) -> NDArray[np.float32]:
        """The ends of the chains before decoding: float32 (N, C, H, W). Arguments as for `sample`."""
        labels = check_labels(self.card, class_labels)
        scale = check_guidance(self.card, guidance_scale)
        done = np.empty((len(labels), *self.card.image_shape), np.float32)
        for start in range(0, len(labels), self.batch):
            part = slice(start, min(start + self.batch, len(labels)))
            images = range(first_image + part.start, first_image + part.stop)
            done[part] = self._chain(labels[part], images, scale, seed, callback)
        return done

    def steps_for(self, count: int) -> int:
        """Number of callbacks that sampling `count` images makes."""
        return math.ceil(count / self.batch) * self.card.sampling.steps

    def close(self) -> None:
        """Free the engine; the sampler cannot be used afterwards."""
        for engine in (self._step, self._decoder):
            if engine is not None:
                engine.close()
        self._step = self._decoder = None

    def __enter__(self) -> Sampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """One call of the step engine: inputs by name (docs/onnx-file.md) to x_next float32 (B, C, H, W)."""
        engine = self._step
        if engine is None:
            raise UsageError("this sampler is closed. Open the engine again.")
        return engine(inputs)

    def to_images(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """States float32 (N, C, H, W), finished or not, as uint8 images (N, H, W, 3); a latent model decodes them."""
        self._check_makes_images()
        return to_pixels(self._decode(latents))

    def _chain(
        self, labels: NDArray[np.int64], images: range, scale: float, seed: int, callback: Callback | None
    ) -> NDArray[np.float32]:
        """One batch from noise to the end: (B, C, H, W)."""
        rows, steps = StepRows(self.card, len(labels)), self.card.sampling.steps
        for label, image in zip(labels, images, strict=True):
            rows.add(int(label), scale, seed, image)
        for step in reversed(range(steps)):
            finite = rows.advance(self.step(rows.inputs()))
            if not finite.all():
                raise rows.failure(int(np.flatnonzero(~finite)[0]))
            if callback is not None and callback(StepReport(step, steps, images, rows.x.copy())):
                raise SamplingStopped(f"stopped by the callback at step {step} of images {images}.")
        return rows.x

    def _decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._decoder is None:
            return latents
        return np.concatenate([self._decoder({"latents": one[None]}) for one in latents])  # one by one: memory


def choose_batch(folder: Path, built: BatchRange | None, asked: int | None) -> int:
    """Refuse more images per call than an engine was built for."""
    if asked is None:
        return DEFAULT_BATCH if built is None else min(DEFAULT_BATCH, built.most)
    if built is not None and asked > built.most:
        raise UsageError(
            f"{folder}: built for at most {built.most} image(s) per call, asked for {asked}. Pass --batch {built.most} "
            f"(batch={built.most}) or less, or build it again: tqdit-build --batch {built.least},{built.best},{asked}."
        )
    return asked


def to_pixels(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Images (N, C, H, W) in -1..1 to uint8 (N, H, W, C), as DiT's sample_ddp.py: clamp(127.5 x + 128), truncated."""
    pixels = np.clip(127.5 * images + 128, 0, 255).astype(np.uint8)
    if pixels.shape[1] != 3:
        raise FileFormatError(f"the engine makes images of {pixels.shape[1]} channels, expected 3.")
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
