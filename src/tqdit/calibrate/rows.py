"""Phase 1: calibration rows, states of the float model's own guided trajectory (Algorithm 1, lines 3 to 8).

Few chains at all T steps, and many rows picked from them: the chains are most of a calibration's cost. A row is what
the network sees: x_t, a timestep and a label, where the two rows of a guided pair share x_t and differ in the label.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqdit.calibrate.config import QuantizationConfig
from tqdit.calibrate.drift import Drift, place_boundaries
from tqdit.diffusion import SamplingSpec, step_coefficients
from tqdit.errors import UsageError
from tqdit.models import LoadedModel
from tqdit.quantization.table import even_boundaries
from tqdit.sampling.noise import INITIAL, normal, normal_rows

RENOISING = 2**40  # image numbers from here on draw the noise of re-noised rows, apart from that of chains


@dataclass(frozen=True)
class CalibrationRows:
    """R rows, sorted by group: row 2 i is conditional, row 2 i + 1 the unconditional one of the same pair."""

    x: Tensor  # float32 (R, C, H, W)
    timestep: Tensor  # int64 (R,), 0..999
    step: Tensor  # int64 (R,), position in the chain, T-1..0
    label: Tensor  # int64 (R,)
    group: Tensor  # int64 (R,)
    noise: Tensor  # float32 (R, C, H, W), the known noise of re-noised rows; zeros for rows of a trajectory
    boundaries: Tensor  # int64 (G - 1,), first timestep of each group but the first

    def __len__(self) -> int:
        return len(self.x)

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self))


@dataclass(frozen=True)
class Picks:
    """Which states become rows: for each pair its group, chain and step, all int64 (R / 2,)."""

    group: NDArray[np.int64]
    chain: NDArray[np.int64]
    step: NDArray[np.int64]
    boundaries: NDArray[Any]  # (G - 1,)


def sampling_of(model: LoadedModel, config: QuantizationConfig) -> SamplingSpec:
    """The chain that rows are taken from: the model's own sampler at the configured number of steps."""
    assert config.steps is not None
    return replace(model.sampling, steps=config.steps)


def pick(spec: SamplingSpec, config: QuantizationConfig, boundaries: NDArray[Any] | None = None) -> Picks:
    """n / 2 pairs per group, spread evenly over the group's steps, chains in turn; random but seeded.

    boundaries (G - 1,): those of even groups where None are given.
    """
    rng = np.random.default_rng([config.seed, 1])
    boundaries, pairs = even_boundaries(config.groups) if boundaries is None else boundaries, config.rows_per_group // 2
    group_of_step = np.searchsorted(boundaries, spec.schedule.timesteps, side="right")
    groups, chains, steps = [], [], []
    for group in range(config.groups):
        members = np.flatnonzero(group_of_step == group)
        if not len(members):
            raise UsageError(
                f"group {group} of {config.groups} has no timestep of a chain of {spec.steps} steps, so no calibration "
                f"rows. Pass --groups {max(1, min(config.groups - 1, spec.steps // 2))} or more --steps."
            )
        position = (np.arange(pairs) + rng.random(pairs)) * len(members) / pairs  # stratified
        steps.append(members[position.astype(np.int64)])
        chains.append((rng.permutation(max(pairs, config.chains))[:pairs]) % config.chains)
        groups.append(np.full(pairs, group))
    return Picks(np.concatenate(groups), np.concatenate(chains), np.concatenate(steps), boundaries)


def every_state(spec: SamplingSpec, config: QuantizationConfig) -> Picks:
    """All states of all chains, in one group: what boundaries are placed by."""
    steps, chains = np.divmod(np.arange(spec.steps * config.chains), config.chains)
    return Picks(np.zeros_like(steps), chains, steps, np.zeros(0, np.int64))


class Chains:
    """Guided chains of the float model, one step at a time, keeping the states that were picked."""

    def __init__(self, model: LoadedModel, spec: SamplingSpec, config: QuantizationConfig, picks: Picks) -> None:
        assert config.guidance_scale is not None
        self.model, self.spec, self.picks, self.seed = model, spec, picks, config.seed
        self.scale = config.guidance_scale
        self.images = np.arange(config.chains)
        self.shape = (model.in_channels, model.height, model.width)
        labels = np.random.default_rng([config.seed, 2]).integers(0, model.num_classes, config.chains)
        self.labels = torch.from_numpy(labels).to(model.device)
        self.x = torch.from_numpy(normal_rows(config.seed, self.images, INITIAL, self.shape)).to(model.device)
        self.states = torch.zeros(len(picks.step), *self.shape, device=model.device)
        self.next_step = spec.steps - 1
        table = step_coefficients(spec.schedule, spec.sampler)
        self.table = {name: getattr(table, name) for name in vars(table)}
        self.config = config
        self.drift = Drift(model.network, spec.steps) if config.boundaries == "drift" else None

    def state_dict(self) -> dict[str, Tensor]:
        tensors = {"x": self.x, "states": self.states, "next_step": torch.tensor([self.next_step])}
        return tensors | ({} if self.drift is None else {"drift": self.drift.statistics})

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.x, self.states, self.next_step = tensors["x"], tensors["states"], int(tensors["next_step"])
        if self.drift is not None:
            self.drift.statistics = tensors["drift"].cpu()

    def place_boundaries(self) -> None:
        """After chains that kept every state: put the groups where the drift says, and pick rows from them."""
        assert self.drift is not None
        assert self.next_step == -1
        timesteps = np.asarray(self.spec.schedule.timesteps, np.int64)
        boundaries = place_boundaries(self.drift.statistics.double().numpy(), timesteps, self.config.groups)
        picks = pick(self.spec, self.config, boundaries)
        self.states = self.states[
            torch.from_numpy(picks.step * self.config.chains + picks.chain).to(self.states.device)
        ]
        self.picks = picks

    def advance(self) -> None:
        """One step of all chains."""
        step = self.next_step
        for index in np.flatnonzero(self.picks.step == step):
            self.states[index] = self.x[self.picks.chain[index]]
        output = self._guided(int(self.spec.schedule.timesteps[step]))
        noise = torch.from_numpy(normal_rows(self.seed, self.images, step, self.shape)).to(self.x.device)
        self.x = self._update(step, output, noise)
        self.next_step = step - 1

    def _guided(self, timestep: int) -> Tensor:
        """The network's output (B, K, H, W) with guidance on the channels that the model's origin guides."""
        null = torch.full_like(self.labels, self.model.num_classes)
        measured = nullcontext() if self.drift is None else self.drift.listen(self.next_step)
        with torch.no_grad(), measured:
            both = self.model.network(
                torch.cat([self.x, self.x]),
                torch.full((2 * len(self.x),), timestep, device=self.x.device),
                torch.cat([self.labels, null]),
            )
        conditional, unconditional = both.chunk(2)
        channels = self.spec.guided_channels or self.model.in_channels
        guided = unconditional + self.scale * (conditional - unconditional)
        return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)

    def _update(self, step: int, output: Tensor, noise: Tensor) -> Tensor:
        """x' = from_x x + from_eps eps + sigma noise (tqdit.diffusion.StepCoefficients)."""
        at = {name: float(values[step]) for name, values in self.table.items()}
        eps, learned = output[:, : self.shape[0]], output[:, self.shape[0] :]
        mean = at["from_x"] * self.x + at["from_eps"] * eps
        if not at["noise_mask"]:
            return mean
        if self.model.learns_variance:
            spread = at["max_log_variance"] - at["min_log_variance"]
            log_variance = at["min_log_variance"] + (learned + 1) / 2 * spread
        else:
            log_variance = torch.tensor(at["fixed_log_variance"])
        return mean + torch.exp(0.5 * log_variance) * noise

    def rows(self) -> CalibrationRows:
        """The picked states as pairs of rows, once every step is done."""
        assert self.next_step == -1
        return pair_up(self.model, self.spec, self.picks, self.states, self.labels, torch.zeros_like(self.states))

    def renoised_rows(self) -> CalibrationRows:
        """Rows from the chains' final samples, noised to the picked steps with known noise."""
        return renoise(self.model, self.spec, self.picks, self.x, self.labels, self.seed)


def renoise(
    model: LoadedModel, spec: SamplingSpec, picks: Picks, x0: Tensor, labels: Tensor, seed: int
) -> CalibrationRows:
    """Rows x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps (DDPM eq. 4), eps known; picks.chain indexes x0 (B, C, H, W)."""
    shape = tuple(x0.shape[1:])
    draws = np.stack([normal(seed, RENOISING + i, 0, shape) for i in range(len(picks.step))])
    noise = torch.from_numpy(draws).to(x0.device)
    abar = torch.from_numpy(spec.schedule.alphas_cumprod[picks.step]).reshape(-1, 1, 1, 1).to(x0.device)
    states = (abar.sqrt() * x0[picks.chain] + (1 - abar).sqrt() * noise).float()
    return pair_up(model, spec, picks, states, labels, noise)


def pair_up(
    model: LoadedModel, spec: SamplingSpec, picks: Picks, states: Tensor, labels: Tensor, noise: Tensor
) -> CalibrationRows:
    """A conditional and an unconditional row of each state."""
    label = torch.full((len(states), 2), model.num_classes, device=states.device)
    label[:, 0] = labels[picks.chain]

    def twice(values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(states.device).repeat_interleave(2)

    return CalibrationRows(
        x=states.repeat_interleave(2, dim=0),
        timestep=twice(spec.schedule.timesteps[picks.step]),
        step=twice(picks.step),
        label=label.reshape(-1),
        group=twice(picks.group),
        noise=noise.repeat_interleave(2, dim=0),
        boundaries=torch.from_numpy(picks.boundaries),
    )


def trajectory(
    chains: Chains, save: Callable[[dict[str, Tensor]], None], save_every: int, done: Callable[[], object]
) -> None:
    """Run chains to their end, saving their state every `save_every` steps."""
    while chains.next_step >= 0:
        chains.advance()
        if (chains.next_step + 1) % save_every == 0:
            save(chains.state_dict())
        done()
