"""The runtime: loop a step engine over the timesteps. NumPy and one backend, no torch, no global state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit import noise
from tqdit.card import GraphCard
from tqdit.engines.backends import Engine, run_row
from tqdit.engines.bundle import check_parts, read_manifest
from tqdit.errors import FileFormatError, SamplingError, SamplingStopped, UsageError

Labels = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class StepReport:
    """What a callback is told after every step."""

    step: int  # that has just been computed; 0 is the last of a chain
    steps: int  # of a chain
    images: range  # indices of the images in this batch
    x: NDArray[np.float32]  # (B, C, H, W), their state; do not change it


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
    def open(cls, path: str | Path, *, batch: int = 16, threads: int | None = None) -> Sampler:
        """Open a bundle that tqdit-build wrote, after checking every file of it.

        batch: images per engine call at most. threads: CPU threads per call; None leaves it to the backend.
        Raises FileFormatError for a damaged bundle, BackendError where it cannot run here.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        check_parts(folder, manifest)
        row = run_row(manifest.backend)
        step = row.load(folder, manifest, manifest.entry, threads)
        decoder = row.load(folder, manifest, manifest.decoder, threads) if manifest.decoder else None
        return cls(manifest.card, step, decoder, batch)

    @property
    def makes_images(self) -> bool:
        """False for a latent model without a decoder, which has only `sample_latents`."""
        return self.card.latent_scale is None or self._decoder is not None

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
        if not self.makes_images:
            raise UsageError(
                "this engine makes latents and has no decoder. Use sample_latents, or export again with --vae DIR."
            )
        latents = self.sample_latents(class_labels, guidance_scale, seed, callback, first_image=first_image)
        return to_pixels(self._decode(latents))

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
        labels = self._check_labels(class_labels)
        scale = self._check_guidance(guidance_scale)
        done = np.empty((len(labels), *self.card.image_shape), np.float32)
        for start in range(0, len(labels), self.batch):
            part = slice(start, min(start + self.batch, len(labels)))
            images = range(first_image + part.start, first_image + part.stop)
            for report in self._chain(labels[part], images, scale, seed):
                if callback is not None and callback(report):
                    raise SamplingStopped(f"stopped by the callback at step {report.step} of images {images}.")
                done[part] = report.x
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

    def _chain(self, labels: NDArray[np.int64], images: range, scale: float, seed: int) -> Iterator[StepReport]:
        """One batch from noise to the end, a report per step."""
        if self._step is None:
            raise UsageError("this sampler is closed. Open the engine again.")
        shape, steps = self.card.image_shape, self.card.sampling.steps
        x = noise.normal_rows(seed, images, noise.INITIAL, shape)
        inputs: dict[str, NDArray[Any]] = {"class_labels": labels, "noise": np.zeros_like(x)}
        if self.card.guided:
            inputs["guidance_scale"] = np.full(len(labels), scale, np.float32)
        adds_noise = self.card.sampling.sampler == "ddpm"
        for step in reversed(range(steps)):
            inputs["x"], inputs["step"] = x, np.full(len(labels), step, np.int64)
            if adds_noise and step > 0:
                inputs["noise"] = noise.normal_rows(seed, images, step, shape)
            x = self._step(inputs)
            if not np.isfinite(x).all():
                row = int(np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))[0])
                raise SamplingError(
                    f"image {images[row]} (class {labels[row]}) became NaN or infinite at step {step}. "
                    "Lower the guidance scale, or export the model again from a good checkpoint."
                )
            yield StepReport(step, steps, images, x)

    def _decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._decoder is None:
            return latents
        return np.concatenate([self._decoder({"latents": one[None]}) for one in latents])  # one by one: memory

    def _check_labels(self, class_labels: Labels) -> NDArray[np.int64]:
        labels = np.asarray(class_labels)
        if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
            raise UsageError("class_labels must be a non-empty list of integers.")
        highest = self.card.num_classes
        bad = labels[(labels < 0) | (labels > highest)]
        if len(bad):
            raise UsageError(
                f"class {bad[0]} is out of range; this model knows 0..{highest - 1} (and {highest}: no class)."
            )
        return labels.astype(np.int64)

    def _check_guidance(self, guidance_scale: float | None) -> float:
        scale = self.card.guidance_scale if guidance_scale is None else float(guidance_scale)
        if not math.isfinite(scale):
            raise UsageError(f"guidance scale {scale} is not a finite number.")
        if not self.card.guided and guidance_scale is not None:
            raise UsageError("this engine was exported with --unguided and takes no guidance scale.")
        return scale


def to_pixels(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Images (N, C, H, W) in -1..1 to uint8 (N, H, W, C), as DiT's sample_ddp.py: clamp(127.5 x + 128), truncated."""
    pixels = np.clip(127.5 * images + 128, 0, 255).astype(np.uint8)
    if pixels.shape[1] != 3:
        raise FileFormatError(f"the engine makes images of {pixels.shape[1]} channels, expected 3.")
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
