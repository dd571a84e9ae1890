"""An engine behind the server: what may be asked of it, and its queue."""

from __future__ import annotations

import asyncio
import difflib
import logging
import math
import re
import secrets
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tqdit.engines.bundle import Manifest, read_manifest
from tqdit.engines.run.backend import check_graph
from tqdit.engines.run.sampler import image_size, makes_images, no_images
from tqdit.engines.run.step_batcher import Progress, ProgressCallback, StepBatcher
from tqdit.errors import DeadlineError, QueueFullError, SamplingStopped, UsageError
from tqdit.sampling.guidance import check_scale
from tqdit.sampling.noise import check_key
from tqdit.sampling.schedule import SamplingSpec, arguments_of, samplers_of
from tqdit.serve.refusals import Refusal
from tqdit.serve.settings import Settings
from tqdit.serve.shapes import ImageRequest, ModelEntry, size_of

log = logging.getLogger("tqdit.serve")

Kind = Literal["class", "text", "unconditional"]
MOST_ENCODERS = 2  # prompts of an engine that are encoded at the same time
MOST_DECODERS = 2  # previews
MOST_WRITERS = 2  # PNG files of finished images
PROBE_S = 5.0  # between two probes of an engine that fails
RECENT = 64  # finished images by which a full queue's Retry-After is estimated
UNKNOWN_S = 5.0  # before one is finished


@dataclass(frozen=True, eq=False)
class Order:
    """A request, checked, with every default filled in. content: as `StepBatcher.submit` takes it."""

    engine: ServedEngine
    content: Any
    count: int
    seed: int
    guidance_scale: float | None
    chain: SamplingSpec
    previews: int
    as_url: bool

    @property
    def full_count(self) -> int | None:
        """How many calls are full, for a request that makes the same images; None: all, without being asked for."""
        chain = self.chain
        if chain.full_calls:
            return chain.calls
        own = self.engine.batcher.card.sampling.choose(
            chain.steps, chain.sampler, guidance_interval=chain.guidance_interval
        )
        return chain.steps if own.full_calls else None


def kind_of_engine(path: Path, manifest: Manifest) -> Kind:
    """What its requests name. Raises UsageError for an engine that no request could speak of."""
    card = manifest.card
    check_graph(card, f"{path}:")
    _ = card.sampling.schedule  # raises if no chain is known
    if not makes_images(manifest):
        raise UsageError(f"{path}: {no_images(card)}")
    if card.signature.label is not None:
        return "class"
    if not card.signature.requests:
        return "unconditional"
    if card.text is None:
        raise UsageError(
            f"{path}: takes {', '.join(card.signature.request_values)} and has no text encoders. Export again with "
            "--text."
        )
    return "text"


@dataclass(eq=False)
class ServedEngine:
    """One engine by name. `batcher` runs it."""

    name: str
    batcher: StepBatcher
    kind: Kind
    manifest: Manifest
    created: int = field(default_factory=lambda: int(time.time()))
    reserved: int = 0  # places of requests whose prompts are being encoded
    fails: bool = False  # also for requests that cannot be the reason
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))  # that finished images were in work
    _probing: asyncio.Task[None] | None = None

    @classmethod
    def open(cls, name: str, path: Path, settings: Settings) -> ServedEngine:
        """Raises TqditError for a bundle that cannot be opened, or not be served."""
        manifest = read_manifest(path)
        kind = kind_of_engine(path, manifest)
        batcher = StepBatcher(
            path, batch=settings.batch, queue=settings.queue, threads=settings.threads, device=settings.device
        )
        try:
            if kind == "text":
                batcher.sampler.encode([""])  # opens the encoders
        except BaseException:
            batcher.close(drain=False)
            raise
        return cls(name, batcher, kind, manifest)

    def __post_init__(self) -> None:
        height, width = image_size(self.batcher.card) or (0, 0)
        self.size = size_of(height, width)
        self._classes = _class_numbers(self.batcher.card.class_names)
        # Threads of this engine and of one kind of work, so that nothing waits for what is slower.
        self._encoders = ThreadPoolExecutor(MOST_ENCODERS, "tqdit-encoder")
        self.decoders = ThreadPoolExecutor(MOST_DECODERS, "tqdit-decoder")
        self.writers = ThreadPoolExecutor(MOST_WRITERS, "tqdit-writer")

    def describe(self, settings: Settings) -> ModelEntry:
        card, label = self.batcher.card, self.batcher.card.signature.label
        return ModelEntry(
            id=self.name, created=self.created, kind=self.kind, classes=label.choices if label else None,
            class_names=list(card.class_names), size=self.size, steps=card.sampling.steps,
            full_calls=None if card.residual is None else card.sampling.calls,
            sampler=card.sampling.sampler, samplers=list(samplers_of(card.sampling.process)),
            guidance_scale=card.guidance.scale if card.guidance else None, precision=self.manifest.precision,
            backend=self.manifest.backend, batch=self.batcher.batch, most_images=settings.most_images,
            most_previews=settings.most_previews, decodes=self.manifest.decoder is not None,
        )  # fmt: skip

    async def order(self, asked: ImageRequest, settings: Settings) -> Order:
        """Check a request. Raises Refusal, UsageError for values that the engine does not take, or DeadlineError."""
        card, count = self.batcher.card, asked.n or 1
        samplers = samplers_of(card.sampling.process)
        if asked.sampler is not None and asked.sampler not in samplers:
            raise _bad("sampler", f"sampler is '{asked.sampler:.60}'; this model has {', '.join(samplers)}.")
        if asked.size not in (None, "auto", self.size):
            raise _bad("size", f"size is '{asked.size}'; this model makes images of {self.size}.")
        if asked.previews is not None and asked.partial_images is not None:
            raise _bad("previews", "previews and partial_images mean the same. Pass one.")
        previews = asked.previews or asked.partial_images or 0
        if previews > settings.most_previews:
            raise _bad("previews", f"previews are {previews}; expected 0 to {settings.most_previews}.")
        scale = check_scale(card.guidance, asked.guidance_scale)
        chain = self.batcher.sampler.choose(
            steps=asked.steps, sampler=asked.sampler, guidance_interval=asked.guidance_interval,
            full_calls=asked.full_calls,
        )  # fmt: skip
        _ = chain.schedule  # raises for numbers that the sampler does not take
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        check_key(seed, 0)
        return Order(
            self, await self._content(asked, settings), count, seed, None if card.guidance is None else scale,
            chain, previews, asked.response_format == "url",
        )  # fmt: skip

    async def _content(self, asked: ImageRequest, settings: Settings) -> Any:
        """What the engine takes of a prompt or a class."""
        if asked.prompt is not None and asked.label is not None:
            raise _bad("prompt", "prompt and class each say what to draw. Pass one.")
        if self.kind == "unconditional":
            if asked.prompt or asked.label is not None:
                raise Refusal(
                    400, "invalid_value", "this model is unconditional. Leave prompt and class out.", "prompt"
                )
            return None
        if self.kind == "class":
            return self._class(asked)
        if asked.label is not None:
            raise _bad("class", "this model takes a text. Pass prompt in place of class.")
        if asked.prompt is None or not asked.prompt.strip():
            raise _bad("prompt", "prompt is missing. Say what to draw.")
        return await self._encode(asked.prompt, settings.deadline_s)

    async def _encode(self, prompt: str, seconds: float | None = None) -> dict[str, NDArray[Any]]:
        """A client that leaves gives up its turn. Raises DeadlineError after so many seconds."""
        work = self._encoders.submit(self.batcher.sampler.encode, [prompt])
        try:
            async with asyncio.timeout(seconds):
                values = await asyncio.wrap_future(work)
        except TimeoutError:
            what = "waited for an encoder" if work.cancelled() else "was being encoded"
            raise DeadlineError(f"the deadline passed while its prompt {what}.") from None
        except UsageError:
            raise
        except Exception:
            self.doubt()
            raise
        return {name: rows[0] for name, rows in values.items()}

    def _class(self, asked: ImageRequest) -> int:
        named, param = (asked.prompt, "prompt") if asked.label is None else (asked.label, "class")
        label = self.batcher.card.signature.label
        most = (label.choices if label else 0) or 0
        if named is None or named == "":
            raise Refusal(
                400, "invalid_value", f"prompt is missing. Name a class, or its number 0 to {most - 1}.", "prompt"
            )
        called = () if isinstance(named, int) else self._classes.get(_folded(named), ())
        if len(called) > 1:
            numbers = ", ".join(map(str, called[:10]))
            raise _bad(param, f"{param} is {named!r:.60}, the name of classes {numbers}. Pass a number.")
        number = named if isinstance(named, int) else called[0] if called else None
        if number is None and re.fullmatch(r"\s*[0-9]{1,9}\s*", str(named), re.ASCII):
            number = int(named)
        if number is None or not 0 <= number < most:
            near = difflib.get_close_matches(_folded(str(named))[:80], self._classes, 3, 0.5)
            hint = f" Similar: {', '.join(near)}." if near and not isinstance(named, int) else ""
            known = "the name of a class, or " if self._classes else ""
            raise _bad(param, f"{param} is {named!r:.60}; expected {known}a number from 0 to {most - 1}.{hint}")
        return number

    def submit(
        self, order: Order, index: int, seconds: float, on_progress: ProgressCallback
    ) -> Future[NDArray[np.uint8]]:
        """Queue image `index` of an order, which fails after so many seconds.

        Raises Refusal with a time to come back if the queue is full.
        """
        every = math.ceil(order.chain.steps / (order.previews + 1)) if order.previews else 0
        try:
            return self.batcher.submit(
                order.content, guidance_scale=order.guidance_scale, seed=order.seed, image_index=index,
                deadline=seconds, on_progress=on_progress, preview_every=every, **arguments_of(order.chain),
            )  # fmt: skip
        except QueueFullError as error:
            raise self.full(order.count) from error

    @contextmanager
    def reserve(self, count: int, most: int) -> Iterator[None]:
        """Hold places while a request is prepared, and give them back just before its images are submitted.

        Raises Refusal for more images than a request may ask for, or if they find no place in the queue.
        """
        self._check_room(count, most)
        self.reserved += count
        try:
            yield
        finally:
            self.reserved -= count

    def _check_room(self, count: int, most: int) -> None:
        stats, places = self.batcher.stats(), self.batcher.batch + self.batcher.queue
        if count > min(most, places):
            raise _bad("n", f"n is {count}; expected 1 to {min(most, places)}.")
        if stats.waiting + stats.running + self.reserved + count > places:
            raise self.full(count)

    def full(self, count: int) -> Refusal:
        """429, with the seconds in which so many places should become free."""
        seconds = UNKNOWN_S
        if self._seconds:
            seconds = math.ceil(count / self.batcher.batch) * sum(self._seconds) / len(self._seconds)
        after = min(max(math.ceil(seconds), 1), 60)
        message = f"the queue of '{self.name}' is full. Ask again in {after} s."
        return Refusal(429, "queue_full", message, headers={"Retry-After": str(after)})

    def finished(self, seconds: float) -> None:
        """Note that an image is done, and how long it was in work."""
        self._seconds.append(seconds)
        self.fails = False

    def doubt(self) -> None:
        """Find out, after a failure, whether it fails whatever it is asked."""
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        """Set `fails` by a request of the server's own, and try again until one succeeds."""
        while self.batcher.is_open:
            try:
                await self._try()
            except QueueFullError:
                pass  # whether its images succeed, `finished` tells
            except Exception as error:
                if not self.fails and self.batcher.is_open:
                    log.error("model '%s' fails whatever it is asked; /health/ready is 503", self.name, exc_info=error)
                self.fails = True
            else:
                self.fails = False
                return
            await asyncio.sleep(PROBE_S)

    async def _try(self) -> None:
        """Encode an empty prompt, or take the first class; compute the first step; decode its state."""
        content = await self._encode("") if self.kind == "text" else 0 if self.kind == "class" else None
        states = []

        def stop(progress: Progress) -> bool:
            states.append(progress.x)
            return True

        with suppress(SamplingStopped):
            await asyncio.wrap_future(self.batcher.submit(content, on_progress=stop, preview_every=1))
        for state in states:
            assert state is not None
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self.decoders, self.batcher.sampler.to_images, state[None])


def _bad(param: str, message: str) -> Refusal:
    return Refusal(400, "invalid_value", message, param)


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())


def _class_numbers(names: tuple[str, ...]) -> Mapping[str, tuple[int, ...]]:
    """Classes by name; a name 'tench, Tinca tinca' is known by each of its parts, unless that is another one's name."""
    whole: dict[str, list[int]] = {}
    parts: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        whole.setdefault(_folded(name), []).append(number)
        for part in {_folded(part) for part in name.split(",")} - {""}:
            parts.setdefault(part, []).append(number)
    return {name: tuple(numbers) for name, numbers in (parts | whole).items()}
