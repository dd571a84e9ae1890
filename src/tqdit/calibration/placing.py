"""Placed steps: where the steps of a short chain lie best for one model, checked on the quantized network.

    long chain  the float network from noise to data in many steps; its states and predictions are kept
    places      for each solver, dynamic programming over local errors on some of these chains (`sampling.placement`)
    check       short chains of the quantized network from the noise of the others, with these places and with
                published spacings, against the ends of their long chains; the least error is kept
    full calls  with --forecast, also chains of more steps, the placed ones and those of the best published spacing, of
                which as many calls are full as were asked for; dynamic programming over the errors of extrapolated
                residuals finds which

Local errors of the quantized network's own predictions place worse: their rounding errors hide the solver's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tqdit.bounds import check_memory
from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.rows import random_requests
from tqdit.calibration.work import WorkFolder
from tqdit.console import Console
from tqdit.errors import UsageError
from tqdit.golden import relative_errors
from tqdit.models.loaded import LoadedModel
from tqdit.ports import Signature
from tqdit.quantization.table import PlacedSteps
from tqdit.sampling.chains import Chains, run
from tqdit.sampling.correction import Correction
from tqdit.sampling.forecasts import LEAST_FULL
from tqdit.sampling.placement import (
    ENTRIES,
    FIRST_IMAGE,
    KEPT,
    LEARNED,
    LONG,
    MOST_PLACED,
    STRIDE,
    LongChain,
    dense,
    place,
    place_full,
    spacings,
)
from tqdit.sampling.process import Diffusion, Flow
from tqdit.sampling.schedule import SamplingSpec

CHECKED = 16  # images by which places are checked, beside those by whose chains they were found
SOLVERS = ("dpm++2m", "unipc")  # that 'auto' tries
SAVES = 25
STRETCHES = (1.5, 2.0)  # steps of chains with forecasts, of each full call
PLACED = "placed"
Process = Diffusion | Flow


def solvers_of(config: QuantizationConfig) -> tuple[str, ...]:
    """The samplers to place steps for."""
    return SOLVERS if config.solver == "auto" else (config.solver,)


def longer_chains(calls: int, most: int) -> list[int]:
    """Steps of the chains with forecasts that are tried, at most so many."""
    return [steps for steps in (round(calls * stretch) for stretch in STRETCHES) if calls < steps <= most]


def check_placing(sampling: SamplingSpec, signature: Signature, config: QuantizationConfig) -> None:
    """Refuse a chain whose steps cannot be placed, before any work."""
    if config.calls is None:
        return
    process = sampling.process.noising
    if process is None:
        raise UsageError(
            f"--calls places steps along a known way from noise to data; the one that {signature.family} was recorded "
            "on is not known. Leave it out."
        )
    for solver in solvers_of(config):
        spec = SamplingSpec(process, solver, config.calls, spacings(process, config.calls)["log-snr"])
        if spec.schedule.is_stochastic:
            raise UsageError(
                f"--solver {solver} draws noise at each step, so its chains have no end to compare with. Pass a "
                "deterministic one."
            )
    if config.forecast and config.calls < LEAST_FULL:
        raise UsageError(f"--forecast needs at least {LEAST_FULL} calls; found --calls {config.calls}. Raise it.")
    if config.forecast and not longer_chains(config.calls, MOST_PLACED):
        raise UsageError(
            f"--forecast tries chains of {STRETCHES[0]:g} times as many steps as calls, and at most {MOST_PLACED} "
            f"steps are placed; found --calls {config.calls}. Pass at most {int(MOST_PLACED / STRETCHES[0])}, or leave "
            "--forecast out."
        )
    of_image = 2 * math.prod(signature.state.row_shape) + ENTRIES * config.forecast
    size = LONG[1] * (LEARNED + CHECKED) * 4 * of_image
    check_memory(f"long chains of {LEARNED + CHECKED} images", size, "Leave out --calls.")


def check_forecasts(model: LoadedModel, config: QuantizationConfig) -> None:
    """Refuse a network of which no call can be forecast, before any work. It is called once, with zeros."""
    if config.forecast:
        model.full({port.name: port.zeros(1) for port in model.signature.ports})


class Placing:
    """One search for the places of the steps, in a work folder that keeps what was done."""

    def __init__(
        self, model: LoadedModel, config: QuantizationConfig, folder: WorkFolder, console: Console,
        requests: Mapping[str, NDArray[Any]] | None = None, correction: Correction | None = None,
    ) -> None:  # fmt: skip
        """requests: what the chains are asked for in turn, (n, ...); None: drawn at random. correction: that
        engines apply to the chains of the quantized network.
        """
        self.correction = correction
        self.model, self.config, self.folder, self.console = model, config, folder, console
        process = model.sampling.process.noising
        assert process is not None
        self.process: Process = process
        assert config.calls is not None
        self.calls = config.calls
        self.images = range(LEARNED + CHECKED)
        if requests is None:
            requests = random_requests(model.signature, len(self.images), config.seed)
        self.requests = {name: values[np.arange(len(self.images)) % len(values)] for name, values in requests.items()}

    def run(self, quantized: LoadedModel, meter: Callable[[int], object]) -> PlacedSteps:
        """The steps with the least error on the quantized network. meter: told how many images went through a call."""
        chain = self.long_chain(meter)
        learned = chain.part(LEARNED, STRIDE)
        longer = longer_chains(self.calls, len(learned.timesteps)) if self.config.forecast else []
        tried: dict[str, SamplingSpec] = {}
        errors: dict[str, float] = {}
        for solver in solvers_of(self.config):
            placed = place(learned, self.process, solver, (self.calls, *longer))
            full = self._of_full_calls(solver, placed[self.calls])
            errors |= self._errors(full, quantized, chain, meter)
            tried |= full
            for steps in longer:
                published = min(spacings(self.process, steps), key=lambda spacing: errors[f"{solver} {spacing}"])
                forecast = self._with_forecasts(chain, solver, placed[steps], published)
                errors |= self._errors(forecast, quantized, chain, meter)
                tried |= forecast
        best = tried[min(errors, key=lambda name: errors[name])]
        return PlacedSteps(best.sampler, tuple(best.schedule.timesteps.tolist()), errors, CHECKED, best.full_calls)

    def _of_full_calls(self, solver: str, placed: tuple[float, ...]) -> dict[str, SamplingSpec]:
        """Chains without forecasts by name: with placed steps, and with published spacings."""
        every = {PLACED: placed, **spacings(self.process, self.calls)}
        return {f"{solver} {spacing}": SamplingSpec(self.process, solver, self.calls, timesteps)
                for spacing, timesteps in every.items()}  # fmt: skip

    def _with_forecasts(
        self, chain: LongChain, solver: str, placed: tuple[float, ...], published: str
    ) -> dict[str, SamplingSpec]:
        """Chains of more steps by name, with as many full calls as were asked for: placed, and with one published
        spacing."""
        steps, found = len(placed), {}
        for spacing, timesteps in ((PLACED, placed), (published, spacings(self.process, steps)[published])):
            spec = SamplingSpec(self.process, solver, steps, timesteps)
            full = place_full(chain.part(LEARNED, 1), spec.schedule, self.calls)
            found[f"{solver} {spacing}, {self.calls} of {steps}"] = spec.choose(full_calls=full)
        return found

    def _errors(
        self, specs: Mapping[str, SamplingSpec], quantized: LoadedModel, chain: LongChain,
        meter: Callable[[int], object],
    ) -> dict[str, float]:  # fmt: skip
        found = {}
        with self.console.bar(len(specs), "placed steps: checks", "chains") as bar:
            for name, spec in specs.items():
                found[name] = self._error(name, spec, quantized, chain.ends[LEARNED:])
                meter(CHECKED * spec.steps)
                bar.update()
        return found

    def long_chain(self, meter: Callable[[int], object]) -> LongChain:
        """All images' chains of the float network, continued from the work folder."""
        sampler, steps = LONG
        spec = SamplingSpec(self.process, sampler, steps, dense(self.process, steps))
        chains, kept = self._chains(spec, self.images), None
        found = self.folder.load_or_none("long-chain")
        if found is not None:
            arrays = {name: tensor.cpu().numpy() for name, tensor in found.items()}
            kept = {name: arrays.pop(name) for name in KEPT if name in arrays}
            chains.restore(arrays)
        with self.console.bar(steps, "placed steps: long chains", "steps") as bar:
            bar.update(steps - 1 - chains.step_of(0))

            def after(step: int, kept: Mapping[str, NDArray[np.float32]]) -> None:
                meter(len(self.images))
                bar.update()
                if step % max(1, steps // SAVES) == 0:
                    state = {**chains.snapshot(), **kept}
                    self.folder.save("long-chain", {name: torch.from_numpy(array) for name, array in state.items()})

            return LongChain.follow(chains, self.model, spec.schedule.timesteps, after, kept, self.config.forecast)

    def _error(self, name: str, spec: SamplingSpec, quantized: LoadedModel, ends: NDArray[np.float32]) -> float:
        """Geometric mean of the images' errors: a mean is decided by the few whose content changes."""
        found = self.folder.load_or_none(f"short-chain {name}")
        if found is None:
            x = run(self._chains(spec, self.images[LEARNED:], self.correction), quantized)
            found = {"errors": torch.from_numpy(relative_errors(x, ends))}
            self.folder.save(f"short-chain {name}", found)
        return float(found["errors"].clamp(1e-30, 1e30).log().mean().exp())

    def _chains(self, spec: SamplingSpec, images: range, correction: Correction | None = None) -> Chains:
        scale = 1.0 if self.config.guidance_scale is None else self.config.guidance_scale
        chains = Chains(self.model.signature, self.model.guidance, len(images), correction)
        for image in images:
            request = {name: values[image] for name, values in self.requests.items()}
            chains.add(spec.schedule, request, scale, self.config.seed, FIRST_IMAGE + image)
        return chains
