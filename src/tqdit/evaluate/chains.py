"""SampledChains of two engines from the same noise, and how far apart they are after every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tqdit.card import GraphCard
from tqdit.diffusion import step_coefficients
from tqdit.engines.run.sampler import Sampler, StepReport
from tqdit.errors import UsageError
from tqdit.evaluate.paired import relative_errors

if TYPE_CHECKING:
    import torch

    from tqdit.models.loaded import LoadedModel

Advance = Callable[[], object]


@dataclass(frozen=True, eq=False)
class SampledChains:
    """What N chains ended with. step_errors: |x - x_ref|^2 / |x_ref|^2 after each step, step 0 (the last one) first."""

    latents: NDArray[np.float32]  # (N, C, H, W)
    pixels: NDArray[np.uint8] | None  # (N, H, W, 3), None without a decoder
    seconds: float
    step_errors: NDArray[np.float64] | None = None  # (N, T)


@dataclass(frozen=True)
class Request:
    """What is sampled: classes in turn, one seed."""

    labels: NDArray[np.int64]
    guidance_scale: float | None
    seed: int


def run(sampler: Sampler, request: Request, advance: Advance) -> SampledChains:
    """All chains of one engine."""
    return _join([_part(sampler, request, start, None, advance)[0] for start in _starts(sampler, request)])


def run_pair(
    reference: Sampler, other: Sampler, request: Request, advance: Advance
) -> tuple[SampledChains, SampledChains]:
    """The same chains of both, batch by batch, so that only one batch's trajectory is in memory."""
    check_comparable(reference.card, other.card)
    ours, theirs = [], []
    for start in _starts(reference, request):
        chains, states = _part(reference, request, start, None, advance, keep=True)
        ours.append(chains)
        theirs.append(_part(other, request, start, states, advance)[0])
    return _join(ours), _join(theirs)


def check_comparable(reference: GraphCard, other: GraphCard) -> None:
    """Same weights, same sampler, same number of steps: else a difference is not quantization's."""
    for what, a, b in (
        ("model (fingerprint)", reference.fingerprint[:12], other.fingerprint[:12]),
        ("number of steps", reference.sampling.steps, other.sampling.steps),
        ("sampler", reference.sampling.sampler, other.sampling.sampler),
        ("guidance", reference.guided, other.guided),
    ):
        if a != b:
            raise UsageError(
                f"the two engines differ in their {what}: {a} and {b}. Export both from one model with the same "
                "settings."
            )


def _starts(sampler: Sampler, request: Request) -> range:
    return range(0, len(request.labels), sampler.batch)


def _part(
    sampler: Sampler, request: Request, start: int, against: NDArray[np.float32] | None, advance: Advance,
    keep: bool = False,
) -> tuple[SampledChains, NDArray[np.float32] | None]:  # fmt: skip
    """One batch. `against` (T, B, C, H, W) are the states of the reference; with `keep` those of this one come back."""
    labels = request.labels[start : start + sampler.batch]
    shape, steps = (len(labels), *sampler.card.image_shape), sampler.card.sampling.steps
    states = np.empty((steps, *shape), np.float32) if keep else None
    latents = np.empty(shape, np.float32)
    errors = None if against is None else np.empty((len(labels), steps))

    def record(report: StepReport) -> None:
        rows = slice(report.images.start - start, report.images.stop - start)
        if states is not None:
            states[report.step, rows] = report.x
        if errors is not None and against is not None:
            errors[rows, report.step] = relative_errors(against[report.step, rows], report.x)
        if report.step == 0:
            latents[rows] = report.x
        advance()

    started = time.perf_counter()
    arguments: dict[str, Any] = {"guidance_scale": request.guidance_scale, "seed": request.seed}
    sample = sampler.sample if sampler.makes_images else sampler.sample_latents
    found: NDArray[Any] = sample(labels, callback=record, first_image=start, **arguments)
    seconds = time.perf_counter() - started
    pixels: NDArray[np.uint8] | None = found if sampler.makes_images else None
    return SampledChains(latents, pixels, seconds, errors), states


def _join(parts: list[SampledChains]) -> SampledChains:
    pixels = [part.pixels for part in parts if part.pixels is not None]
    errors = [part.step_errors for part in parts if part.step_errors is not None]
    return SampledChains(
        np.concatenate([part.latents for part in parts]),
        np.concatenate(pixels) if pixels else None,
        sum(part.seconds for part in parts),
        np.concatenate(errors) if errors else None,
    )


class TorchStep:
    """A step graph computed by PyTorch, behind the seam that engines have: for models that no engine was built of."""

    def __init__(self, model: LoadedModel, card: GraphCard) -> None:
        self.model, self.card = model, card
        table = step_coefficients(card.sampling.schedule, card.sampling.sampler)
        self._table = {name: getattr(table, name) for name in vars(table)}
        self._timesteps = card.sampling.schedule.timesteps

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        import torch

        device, step = self.model.device, inputs["step"]
        x, noise, labels = (torch.from_numpy(inputs[name]).to(device) for name in ("x", "noise", "class_labels"))
        at = {
            name: torch.from_numpy(values[step]).float().reshape(-1, 1, 1, 1).to(device)
            for name, values in self._table.items()
        }
        timestep = torch.from_numpy(self._timesteps[step]).to(device)
        with torch.no_grad():
            output = self._network(x, timestep, labels, inputs.get("guidance_scale"))
        eps, learned = output[:, : x.shape[1]], output[:, x.shape[1] :]
        mean = at["from_x"] * x + at["from_eps"] * eps
        if learned.shape[1]:
            spread = at["max_log_variance"] - at["min_log_variance"]
            log_variance = at["min_log_variance"] + (learned + 1) / 2 * spread
        else:
            log_variance = at["fixed_log_variance"]
        result: NDArray[np.float32] = (mean + at["noise_mask"] * torch.exp(0.5 * log_variance) * noise).cpu().numpy()
        return result

    def _network(
        self, x: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor, scale: NDArray[np.float32] | None
    ) -> torch.Tensor:
        import torch

        if scale is None:
            alone: torch.Tensor = self.model.network(x, timestep, labels)
            return alone
        null = torch.full_like(labels, self.model.num_classes)
        both = self.model.network(torch.cat([x, x]), torch.cat([timestep, timestep]), torch.cat([labels, null]))
        conditional, unconditional = both.chunk(2)
        channels = self.card.sampling.guided_channels or self.model.in_channels
        factor = torch.from_numpy(scale).to(x.device).reshape(-1, 1, 1, 1)
        guided = unconditional + factor * (conditional - unconditional)
        return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)

    def close(self) -> None:
        """Nothing to free."""


def torch_sampler(model: LoadedModel, card: GraphCard, batch: int) -> Sampler:
    """A sampler of a PyTorch model, float or fake-quantized, with the conventions of `card`."""
    return Sampler(replace(card, quantization=None, vae=None), TorchStep(model, card), batch=batch)


def card_of(model: LoadedModel, steps: int | None = None) -> GraphCard:
    """The card that an export of this model would have: a guided step graph."""
    from tqdit.version import __version__

    sampling = model.sampling if steps is None else replace(model.sampling, steps=steps)
    return GraphCard(
        graph="step", channels=model.in_channels, out_channels=model.out_channels, height=model.height,
        width=model.width, num_classes=model.num_classes, guided=True, guidance_scale=model.guidance_scale,
        sampling=sampling, latent_scale=model.latent_scale, class_names=model.class_names, model=model.source,
        origin=model.origin, fingerprint=model.fingerprint, written_by=__version__,
    )  # fmt: skip


def float_engine(card: GraphCard, folder: Path, backend: str) -> Path:
    """A float engine of the model that a card names, with the card's sampler and steps, in `folder`.

    Raises UsageError if the model has changed since.
    """
    from tqdit.engines.build.engine import build_engine
    from tqdit.export import ExportConfig, export_graph, write
    from tqdit.models.load import load_model

    model = load_model(card.model)
    check_fingerprint(model.fingerprint, card)
    config = ExportConfig("step", card.sampling.steps, card.sampling.sampler, card.guided)
    write(folder / "float.onnx", *export_graph(model, config))
    build_engine(folder / "float.onnx", folder / "float.engine", backend)
    return folder / "float.engine"


def check_fingerprint(fingerprint: str, card: GraphCard) -> None:
    if fingerprint != card.fingerprint:
        raise UsageError(
            f"'{card.model}' (fingerprint {fingerprint[:12]}) is not the model of the engine "
            f"({card.fingerprint[:12]}). Pass a float engine of the same model with --against."
        )
