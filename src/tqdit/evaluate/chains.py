"""Chains of two engines from the same noise, and how far apart they are after every step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tqdit.card import GraphCard
from tqdit.engines.run.requests import Prompts
from tqdit.engines.run.sampler import Sampler, StepReport
from tqdit.engines.run.shards import SamplingJob
from tqdit.errors import UsageError
from tqdit.evaluate.paired import relative_errors
from tqdit.interface import Interface
from tqdit.sampling.guidance import Guidance

Advance = Callable[[], object]


@dataclass(frozen=True, eq=False)
class SampledChains:
    """What N chains ended with. step_errors: |x - x_ref|^2 / |x_ref|^2 after each step, step 0 (the last one) first."""

    latents: NDArray[np.float32]  # (N, ...)
    pixels: NDArray[np.uint8] | None  # (N, H, W, 3), None without a decoder
    seconds: float
    step_errors: NDArray[np.float64] | None = None  # (N, T)


def run(sampler: Sampler, job: SamplingJob, advance: Advance, prompts: Prompts | None = None) -> SampledChains:
    """All chains of one engine, shard by shard. `advance` is called after every step of a batch. prompts: the job's."""
    return _join([_shard(sampler, job, shard, None, advance, prompts=prompts)[0] for shard in range(job.shards)])


def run_pair(
    reference: Sampler, other: Sampler, job: SamplingJob, advance: Advance, prompts: Prompts | None = None
) -> tuple[SampledChains, SampledChains]:
    """The same chains of both, shard by shard: the trajectories of one shard are in memory. prompts: the job's.

    The reference computes every call in full, so that errors are also those of the other one's forecasts.
    """
    check_comparable(reference.card, other.card)
    full, ours, theirs = replace(job, full_calls=()), [], []
    for shard in range(job.shards):
        chains, states = _shard(reference, full, shard, None, advance, keep=True, prompts=prompts)
        ours.append(chains)
        theirs.append(_shard(other, job, shard, states, advance, prompts=prompts)[0])
    return _join(ours), _join(theirs)


def check_comparable(reference: GraphCard, other: GraphCard) -> None:
    """Refuse engines whose chains differ by more than quantization: other weights, process or guidance."""
    for what, a, b in (
        ("model (fingerprint)", reference.fingerprint[:12], other.fingerprint[:12]),
        ("sampling process", reference.sampling.process, other.sampling.process),
        ("guidance", _form(reference.guidance), _form(other.guidance)),
    ):
        if a != b:
            raise UsageError(
                f"the two engines differ in their {what}: {a} and {b}. Export both from one model with the same "
                "settings."
            )


def _form(guidance: Guidance | None) -> str:
    """Without the scale, which is chosen when sampling."""
    if guidance is None:
        return "none"
    return "of all channels" if guidance.channels is None else f"of {guidance.channels} channels"


def _shard(
    sampler: Sampler, job: SamplingJob, shard: int, against: NDArray[np.float32] | None, advance: Advance,
    keep: bool = False, prompts: Prompts | None = None,
) -> tuple[SampledChains, NDArray[np.float32] | None]:  # fmt: skip
    """One shard. `against` (T, B, ...) are the states of the reference; with `keep` those of this one come back."""
    images = job.images(shard)
    shape = (len(images), *sampler.card.state_shape)
    states = np.empty((job.steps, *shape), np.float32) if keep else None
    latents = np.empty(shape, np.float32)
    errors = None if against is None else np.empty((len(images), job.steps))

    def record(report: StepReport) -> None:
        rows = slice(report.images.start - images.start, report.images.stop - images.start)
        if states is not None:
            states[report.step, rows] = report.x
        if errors is not None and against is not None:
            errors[rows, report.step] = relative_errors(against[report.step, rows], report.x)
        if report.step == 0:
            latents[rows] = report.x
        advance()

    started = time.perf_counter()
    job = replace(job, content="images" if sampler.makes_images else "latents")
    pixels = job.make(sampler, shard, record, prompts).get("arr_0")
    return SampledChains(latents, pixels, time.perf_counter() - started, errors), states


def _join(parts: list[SampledChains]) -> SampledChains:
    pixels = [part.pixels for part in parts if part.pixels is not None]
    errors = [part.step_errors for part in parts if part.step_errors is not None]
    return SampledChains(
        np.concatenate([part.latents for part in parts]),
        np.concatenate(pixels) if pixels else None,
        sum(part.seconds for part in parts),
        np.concatenate(errors) if errors else None,
    )


def float_engine(card: GraphCard, folder: Path, backend: str, interface: Interface | None = None) -> Path:
    """A float engine of the model that a card names, in `folder`. interface: what was learned of a recorded model.

    Raises UsageError if the model has changed since.
    """
    from tqdit.engines.build.engine import build_engine
    from tqdit.exporter.graph import ExportConfig, export_graph
    from tqdit.exporter.onnx_writer import write
    from tqdit.models.load import load_model

    model = load_model(card.model, interface=interface)
    if model.fingerprint != card.fingerprint:
        raise UsageError(
            f"'{card.model}' (fingerprint {model.fingerprint[:12]}) is not the model of the engine "
            f"({card.fingerprint[:12]}). Pass a float engine of the same model with --against."
        )
    config = ExportConfig("denoiser", card.sampling.steps, card.sampling.sampler, card.guidance is not None)
    write(folder / "float.onnx", *export_graph(model, config))
    build_engine(folder / "float.onnx", folder / "float.engine", backend)
    return folder / "float.engine"
