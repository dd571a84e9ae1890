"""The runtime: sample with an engine; the loop runs on the host. NumPy and one backend, no torch, no global state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from tqdit.bounds import MOST_BATCH, check_count, check_memory
from tqdit.card import GraphCard
from tqdit.engines.bundle import Manifest
from tqdit.engines.config import BatchRange
from tqdit.engines.gpu import GpuChoice
from tqdit.engines.run.backend import check_graph, open_bundle
from tqdit.engines.run.requests import open_texts, read_embeddings
from tqdit.engines.run.verify import open_verified
from tqdit.errors import FileFormatError, SamplingStopped, UsageError
from tqdit.ports import Requests, check_requests
from tqdit.sampling import chains
from tqdit.sampling.chains import Chains, Network
from tqdit.sampling.forecasts import ForecastNetwork
from tqdit.sampling.guidance import check_scale
from tqdit.sampling.noise import check_key
from tqdit.sampling.schedule import ChainArguments, SamplingSpec
from tqdit.text import TextEncoder

DEFAULT_BATCH = 16


@dataclass(frozen=True)
class StepReport:
    """What a callback is told after every step."""

    step: int  # the one that has just been computed; 0 is the last of a chain
    steps: int  # of a chain
    images: range  # indices of the images in this batch
    x: NDArray[np.float32]  # (B, ...), a copy of their states


Callback = Callable[[StepReport], bool | None]


class Sampler:
    """Samples images with one engine. Thread-safe: every call keeps its state to itself.

        with Sampler.open("model.engine") as sampler:
            images = sampler.sample([0, 1, 2], seed=7)  # uint8 (3, H, W, 3)

    An image depends on the engine, the seed, its index, its request, the guidance scale, the sampler and its steps, and
    on nothing else.
    """

    def __init__(
        self, card: GraphCard, network: Network, decoder: Network | None = None, batch: int = 16,
        folder: Path | None = None, any_rows: bool = True, forecast: Network | None = None,
    ) -> None:  # fmt: skip
        """network: ports by name -> prediction; with forecasts it has `outputs`, which also gives the residual.
        forecast: ports and the residual -> prediction. decoder: {"latents": states} -> images float32 (B, C, H, W), or
        videos (B, C, F, H, W), in -1..1. folder: of the bundle, if it may have text encoders.
        any_rows: whether the network takes any number of rows. batch: images per call at most. `close` closes those
        of them that have a method of that name.
        """
        check_graph(card)
        self.card = card
        self.batch = check_count("batch", batch, 1, MOST_BATCH)
        self._network: Any = network  # None: closed
        self._forecast, self._decoder = forecast, decoder
        self._folder = folder  # with the text encoders
        self._any_rows = any_rows
        self._texts: TextEncoder | None = None

    @classmethod
    def open(
        cls, path: str | Path, *, batch: int | None = None, threads: int | None = None, device: GpuChoice = None,
        verify: bool | None = None,
    ) -> Sampler:  # fmt: skip
        """Open a bundle that tqdit-build wrote, after checking every file of it.

        batch: images per engine call at most; None: 16, or fewer if the engine was built for fewer. threads: CPU
        threads per call; None leaves it to the backend. device: index of the GPU, or a `GpuShare`; None: the current
        one. verify: run the bundle's golden calls first, on this machine; None: once for each GPU, and not on a CPU.
        Raises VerificationError if they are wrong or if there are none to run, FileFormatError for a damaged
        bundle, BackendError if it cannot run here, UsageError for a step graph.
        """
        manifest, load = open_bundle(path, threads, device)
        _ = manifest.card.sampling.schedule  # raises if no chain is known
        batch = choose_batch(Path(path), manifest.batch, batch)
        with ExitStack() as refused:
            network, forecast = open_verified(Path(path), manifest, load, refused, verify)
            decoder = load(manifest.decoder) if manifest.decoder else None
            refused.pop_all()  # all is right: the engine stays open
        return cls(manifest.card, network, decoder, batch, Path(path), manifest.batch is None, forecast)

    @property
    def makes_images(self) -> bool:
        """Whether states become pictures; otherwise there is only `sample_latents`."""
        return self._decoder is not None or has_pixels(self.card)

    def _check_makes_images(self) -> None:
        if not self.makes_images:
            raise UsageError(no_images(self.card))

    def sample(
        self,
        requests: Requests,
        guidance_scale: float | None = None,
        seed: int = 0,
        callback: Callback | None = None,
        *,
        first_image: int = 0,
        **chain: Unpack[ChainArguments],
    ) -> NDArray[np.uint8]:
        """One image per request: uint8 (N, H, W, 3); one video: (N, F, H, W, 3).

        requests: the classes, for a class-conditional model (ints in 0..num_classes; the last one is unconditional);
        the number of images, for an unconditional one; in general a dict with an array (N, ...) for each request port.
        guidance_scale: None: what the engine's card proposes. callback: called after every step; returning True stops
        with SamplingStopped. first_image: index of the first image; image i of one call equals image 0 of a call with
        first_image=i. chain: steps, sampler, timesteps, guidance_interval and full_calls, each as `ChainArguments`
        says. Raises UsageError for values that the model does not take.
        """
        self._check_makes_images()
        latents = self.sample_latents(requests, guidance_scale, seed, callback, first_image=first_image, **chain)
        return self.to_images(latents)

    def sample_latents(
        self,
        requests: Requests,
        guidance_scale: float | None = None,
        seed: int = 0,
        callback: Callback | None = None,
        *,
        first_image: int = 0,
        **chain: Unpack[ChainArguments],
    ) -> NDArray[np.float32]:
        """The ends of the chains before decoding: float32 (N, ...). Arguments as for `sample`."""
        if isinstance(requests, Sized) and not isinstance(requests, Mapping):
            self._check_memory(len(requests))  # before they become an array
        count, arrays = check_requests(self.card.signature, requests)
        scale = check_scale(self.card.guidance, guidance_scale)
        spec = self.choose(**chain)
        check_key(seed, first_image)
        self._check_memory(count)
        done = np.empty((count, *self.card.state_shape), np.float32)
        for start in range(0, count, self.batch):
            part = slice(start, min(start + self.batch, count))
            images = range(first_image + part.start, first_image + part.stop)
            rows = {name: values[part] for name, values in arrays.items()}
            done[part] = self._chain(rows, images, scale, seed, spec, callback)
        return done

    def choose(self, **chain: Unpack[ChainArguments]) -> SamplingSpec:
        """The chain of these arguments, as for `sample`.

        Raises UsageError for what this engine cannot do.
        """
        return self.card.choose(self._any_rows, **chain)

    def _check_memory(self, count: int) -> None:
        check_memory(f"{count} images at once", count * bytes_per_image(self.card)[0], "Sample fewer at a time.")

    def read_requests(self, path: str | Path) -> dict[str, NDArray[Any]]:
        """What a model of text takes of each prompt, from a safetensors file: `requests` for `sample`.

        The file has one tensor (prompts, ...) for each of `card.signature.request_values`, or is what the calls of
        `tqdit.record` were saved to. Raises FileFormatError for values that the model does not take.
        """
        return dict(read_embeddings(Path(path), self.card.signature).values)

    def encode(self, prompts: Sequence[str]) -> dict[str, NDArray[Any]]:
        """What the model takes of these texts: `requests` for `sample`. The bundle must have text encoders.

        They are opened by the first call and run on the CPU. Raises UsageError if there are none, or for a prompt that
        is too long.
        """
        if isinstance(prompts, str):
            raise UsageError("expected a list of prompts, found one text. Pass [prompt].")
        if self._texts is None:
            self._texts = open_texts(self._folder or Path(), self.card)
        return self._texts(prompts)

    def steps_for(self, count: int, steps: int | None = None) -> int:
        """Number of callbacks that sampling `count` images makes."""
        return math.ceil(count / self.batch) * (self.card.sampling.steps if steps is None else steps)

    def close(self) -> None:
        """Free the engine; the sampler cannot be used afterwards."""
        for network in (self._network, self._forecast, self._decoder):
            getattr(network, "close", lambda: None)()
        self._network = self._forecast = self._decoder = self._texts = None

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def predict(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """One call of the engine: ports by name to the prediction float32 (rows, K, ...)."""
        prediction: NDArray[np.float32] = self._opened()(inputs)
        return prediction

    @property
    def network(self) -> ForecastNetwork:
        """The engine as chains call it."""
        return _Calls(self)

    def _opened(self) -> Any:
        network = self._network
        if network is None:
            raise UsageError("this sampler is closed. Open the engine again.")
        return network

    def to_images(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """States float32 (N, ...), finished or not, as uint8 images (N, H, W, 3); a latent model decodes them."""
        self._check_makes_images()
        decode = self._decoder
        if decode is None:
            return to_pixels(latents)
        return np.concatenate([to_pixels(decode({"latents": one[None]})) for one in latents])  # one by one: memory

    def _chain(
        self, requests: Mapping[str, NDArray[Any]], images: range, scale: float, seed: int, spec: SamplingSpec,
        callback: Callback | None,
    ) -> NDArray[np.float32]:  # fmt: skip
        """One batch from noise to the end: (B, ...)."""
        batch = Chains(self.card.signature, self.card.guidance, len(images), self.card.correction)
        for row, image in enumerate(images):
            batch.add(spec.schedule, {name: values[row] for name, values in requests.items()}, scale, seed, image)

        def report(step: int) -> None:
            if callback is not None and callback(StepReport(step, spec.steps, images, batch.x.copy())):
                raise SamplingStopped(f"stopped by the callback at step {step} of images {images}.")

        return chains.run(batch, self.network, report)


class _Calls:
    """The calls of a sampler's engines."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        return self._sampler.predict(inputs)

    def full(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        prediction, residual = self._sampler._opened().outputs(inputs)
        return prediction, residual

    def forecast(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        self._sampler._opened()
        network = self._sampler._forecast
        assert network is not None, "an engine whose card has a residual has a forecast"
        return network(inputs)


def has_pixels(card: GraphCard) -> bool:
    """Whether the states are pictures as they are: grey (1, H, W) or RGB (3, H, W)."""
    return card.latents is None and len(card.state_shape) == 3 and card.state_shape[0] in (1, 3)


def no_images(card: GraphCard) -> str:
    """Why an engine without a decoder makes no pictures, and what to do."""
    if card.latents is None:
        return (
            f"this engine makes states of shape {card.state_shape}, and pictures have 1 or 3 channels. Use "
            "sample_latents, or name a .npz."
        )
    return (
        "this engine makes latents and has no decoder. Use sample_latents or name a .npz, or export again with --vae "
        "DIR."
    )


def makes_images(manifest: Manifest) -> bool:
    """Whether a sampler of this bundle makes pictures."""
    return manifest.decoder is not None or has_pixels(manifest.card)


def image_size(card: GraphCard) -> tuple[int, int] | None:
    """(height, width) of the pictures that states become; None if there are none."""
    if card.vae is not None:
        return card.vae.image_height, card.vae.image_width
    return (card.state_shape[1], card.state_shape[2]) if has_pixels(card) else None


def bytes_per_image(card: GraphCard) -> tuple[int, int]:
    """What an image takes in memory until it is written, its state and its pixels; and in a file."""
    height, width = image_size(card) or (0, 0)
    frames = (card.vae and card.vae.frames) or 1
    state, pixels = 4 * math.prod(card.state_shape), 3 * height * width * frames
    return state + pixels, pixels or state


def choose_batch(folder: Path, built: BatchRange | None, asked: int | None) -> int:
    """Images per call at most. Raises UsageError if the engine was built for fewer."""
    if asked is None:
        return DEFAULT_BATCH if built is None else min(DEFAULT_BATCH, built.most)
    check_count("batch", asked, 1, MOST_BATCH)
    if built is not None and asked > built.most:
        raise UsageError(
            f"{folder}: built for at most {built.most} image(s) per call, asked for {asked}. Pass --batch {built.most} "
            f"(batch={built.most}) or less, or build it again: tqdit-build --batch {built.least},{built.best},{asked}."
        )
    return asked


def to_pixels(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Images (N, C, H, W) in -1..1 to uint8 (N, H, W, 3), as DiT's sample_ddp.py: clamp(127.5 x + 128), truncated.

    C is 3, or 1 for grey images. Videos (N, C, F, H, W) become (N, F, H, W, 3).
    """
    if images.ndim not in (4, 5) or images.shape[1] not in (1, 3):
        raise FileFormatError(f"the engine makes images of shape {list(images.shape)}, expected (N, 1 or 3, H, W).")
    pixels = np.moveaxis(np.clip(127.5 * images + 128, 0, 255).astype(np.uint8), 1, -1)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:-1], 3)))
