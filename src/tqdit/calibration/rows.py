"""Phase 1: calibration rows, states of the float model's own trajectory (Algorithm 1, lines 3 to 8).

Few chains at all T steps, and many rows picked from them: the chains are most of a calibration's cost. A row is one row
of a network call: with guidance, the two rows of a pair share the state and differ in the request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.drift import Drift, place_boundaries
from tqdit.errors import UsageError
from tqdit.models.loaded import LoadedModel
from tqdit.models.recording import Recording
from tqdit.ports import NEGATIVE, Port, Signature
from tqdit.quantization.granularity import group_of
from tqdit.quantization.table import even_boundaries
from tqdit.sampling.chains import Chains, run
from tqdit.sampling.guidance import rows_per_image
from tqdit.sampling.noise import normal
from tqdit.sampling.process import Recorded, Unsampled
from tqdit.sampling.schedule import SamplingSpec

RENOISING = 2**40  # image numbers from here on draw the noise of re-noised rows, apart from that of chains


@dataclass(frozen=True)
class CalibrationRows:
    """R rows, sorted by group; with guidance, row 2 i is conditional and row 2 i + 1 its unconditional partner."""

    inputs: dict[str, Tensor]  # port -> (R, ...)
    step: Tensor  # int64 (R,), position in the chain, T-1..0
    group: Tensor  # int64 (R,)
    target: Tensor  # float32 (R, C, ...), what the network should predict for re-noised rows; zeros for other rows
    boundaries: Tensor  # float64 (G - 1,), first timestep of each group but the first

    def __len__(self) -> int:
        return len(self.step)

    def part(self, start: int, stop: int) -> dict[str, Tensor]:
        """The ports of rows start..stop."""
        return {name: tensor[start:stop] for name, tensor in self.inputs.items()}

    def tensors(self) -> dict[str, Tensor]:
        return {f"port.{name}": tensor for name, tensor in self.inputs.items()} | {
            "step": self.step, "group": self.group, "target": self.target, "boundaries": self.boundaries
        }  # fmt: skip

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> CalibrationRows:
        ports = {name.removeprefix("port."): tensor for name, tensor in tensors.items() if name.startswith("port.")}
        return cls(ports, *(tensors[name] for name in ("step", "group", "target", "boundaries")))


@dataclass(frozen=True)
class Picks:
    """Which states become rows: for each its group, chain and step, all int64 (P,)."""

    group: NDArray[np.int64]
    chain: NDArray[np.int64]
    step: NDArray[np.int64]
    boundaries: NDArray[np.float64]  # (G - 1,)


def sampling_of(model: LoadedModel, config: QuantizationConfig) -> SamplingSpec:
    """The chain that rows are taken from: the model's own sampler at the configured number of steps."""
    return model.sampling.choose(config.steps)


def pick(
    model: LoadedModel, config: QuantizationConfig, boundaries: NDArray[np.float64] | None = None,
    chains: int | None = None,
) -> Picks:  # fmt: skip
    """The states of n rows per group, spread evenly over the group's steps, chains in turn; random but seeded.

    boundaries (G - 1,): those of even groups if None. chains: how many there are to pick from, if not the config's.
    """
    rng = np.random.default_rng([config.seed, 1])
    spec, each = sampling_of(model, config), rows_per_image(model.guidance)
    if config.rows_per_group % each:
        raise UsageError(
            f"--rows-per-group is {config.rows_per_group}; the two rows of a guided pair come together. "
            "Pass an even number."
        )
    if boundaries is None:
        boundaries = boundaries_of(spec, config.groups)
    count = config.rows_per_group // each
    of_step = group_of(boundaries, spec.schedule.timesteps)
    groups, picked, steps = [], [], []
    for group in range(config.groups):
        members = np.flatnonzero(of_step == group)
        if not len(members):
            raise UsageError(
                f"group {group} of {config.groups} has no timestep of a chain of {spec.steps} steps, so no calibration "
                f"rows. Pass --groups {max(1, min(config.groups - 1, spec.steps // 2))} or more --steps."
            )
        position = (np.arange(count) + rng.random(count)) * len(members) / count  # stratified
        steps.append(members[position.astype(np.int64)])
        available = config.chains if chains is None else chains
        picked.append((rng.permutation(max(count, available))[:count]) % available)
        groups.append(np.full(count, group))
    return Picks(np.concatenate(groups), np.concatenate(picked), np.concatenate(steps), boundaries)


def boundaries_of(spec: SamplingSpec, groups: int) -> NDArray[np.float64]:
    """Groups of equal length in time; for a recorded chain, of equally many steps.

    A recorded scheduler puts its steps where it wants; boundaries lie half way between two of them.
    """
    if not isinstance(spec.process, Recorded):
        return even_boundaries(groups, spec.process.span)
    return _between(spec.schedule.timesteps, groups)


def _between(timesteps: NDArray[np.float64], groups: int) -> NDArray[np.float64]:
    """Boundaries of groups of equally many timesteps, half way between two of them."""
    timesteps = np.unique(timesteps)
    if groups > len(timesteps):
        raise UsageError(f"--groups is {groups}; there are {len(timesteps)} timesteps. Pass at most as many groups.")
    first = -(-len(timesteps) * np.arange(1, groups) // groups)
    return (timesteps[first - 1] + timesteps[first]) / 2


def every_state(spec: SamplingSpec, config: QuantizationConfig) -> Picks:
    """All states of all chains, in one group: what boundaries are placed by."""
    steps, chains = np.divmod(np.arange(spec.steps * config.chains), config.chains)
    return Picks(np.zeros_like(steps), chains, steps, np.zeros(0))


class Trajectory:
    """Chains of the float model, keeping the states that were picked."""

    def __init__(self, model: LoadedModel, config: QuantizationConfig, picks: Picks) -> None:
        self.model, self.config, self.picks = model, config, picks
        self.spec = sampling_of(model, config)
        self.requests = random_requests(model.signature, config.chains, config.seed)
        self.chains = Chains(model.signature, model.guidance, config.chains)
        scale = 1.0 if config.guidance_scale is None else config.guidance_scale
        for image in range(config.chains):
            request = {name: values[image] for name, values in self.requests.items()}
            self.chains.add(self.spec.schedule, request, scale, config.seed, image)
        self.states = np.zeros((len(picks.step), *model.signature.state.row_shape), np.float32)
        self.drift = Drift(model, self.spec.steps) if config.boundaries == "drift" else None

    @property
    def next_step(self) -> int:
        """The step that comes next; -1 at the end."""
        return self.chains.step_of(0)

    def state_dict(self) -> dict[str, Tensor]:
        arrays = {**self.chains.snapshot(), "states": self.states}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return tensors | ({} if self.drift is None else {"drift": self.drift.statistics})

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        if self.drift is not None:
            self.drift.statistics = tensors["drift"].cpu()
        self.states = arrays.pop("states")
        self.chains.restore(arrays)

    def place_boundaries(self) -> None:
        """After chains that kept every state: put the groups where the drift says, and pick rows from them."""
        assert self.drift is not None
        assert self.next_step == -1
        statistics = self.drift.statistics.double().numpy()
        boundaries = place_boundaries(statistics, self.spec.schedule.timesteps, self.config.groups)
        picks = pick(self.model, self.config, boundaries)
        self.states = self.states[picks.step * self.config.chains + picks.chain]
        self.picks = picks

    def run(self, after: Callable[[int], object] = lambda _: None) -> None:
        """Run to the end; `after` is called with every step that is done."""
        run(self.chains, self.call, after)

    def call(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The network call of the next step, whose picked states are kept."""
        step = self.next_step
        for index in np.flatnonzero(self.picks.step == step):
            self.states[index] = self.chains.x[self.picks.chain[index]]
        with nullcontext() if self.drift is None else self.drift.listen(step):
            return self.model(inputs)

    def rows(self) -> CalibrationRows:
        """The picked states as rows, once every step is done."""
        assert self.next_step == -1
        return make_rows(self.model, self.spec, self.picks, self.states, self.requests, np.zeros_like(self.states))

    def renoised_rows(self) -> CalibrationRows:
        """Rows from the chains' final samples, noised to the picked steps with known noise."""
        return renoise(self.model, self.spec, self.picks, self.chains.x, self.requests, self.config.seed)


def recorded_rows(model: LoadedModel, config: QuantizationConfig, recording: Recording) -> CalibrationRows:
    """Rows from chains that a pipeline ran, or from calls of the network alone."""
    if isinstance(recording.interface.sampling.process, Unsampled):
        return _called_rows(model, config, recording)
    picks = pick(model, config, chains=len(recording))
    states = recording.states[picks.chain, picks.step]
    return make_rows(model, recording.interface.sampling, picks, states, recording.requests, np.zeros_like(states))


def noise_rows(model: LoadedModel, config: QuantizationConfig) -> CalibrationRows:
    """Rows whose states are normal noise, at timesteps of the whole chain: no chain has to run for them.

    They prove that an engine computes what the network does; how good its images are, they do not tell.
    Raises UsageError for a network with requests that cannot be drawn at random.
    """
    picks = pick(model, config)
    shape = model.signature.state.row_shape
    states = np.stack([normal(config.seed, RENOISING + index, 0, shape) for index in range(len(picks.step))])
    requests = random_requests(model.signature, config.chains, config.seed)
    return make_rows(model, sampling_of(model, config), picks, states, requests, np.zeros_like(states))


def _called_rows(model: LoadedModel, config: QuantizationConfig, recording: Recording) -> CalibrationRows:
    """n of the recorded rows per group, random but seeded."""
    rng = np.random.default_rng([config.seed, 1])
    timesteps = recording.requests[model.signature.time.name].astype(np.float64)
    if timesteps.ndim > 1 and config.time_groups != "none":
        raise UsageError(f"each row has {timesteps[0].size} timesteps, expected one. Pass --time-groups none.")
    timesteps = timesteps.reshape(len(timesteps), -1).max(1)
    boundaries = _between(timesteps, config.groups)
    of_row = group_of(boundaries, timesteps)
    members = [np.flatnonzero(of_row == group) for group in range(config.groups)]
    index = np.concatenate([rng.permutation(np.resize(rows, max(len(rows), config.rows_per_group)))
                            [: config.rows_per_group] for rows in members])  # fmt: skip
    arrays = {model.signature.state.name: recording.states[:, 0]} | recording.requests
    inputs = {name: torch.from_numpy(arrays[name][index]).to(model.device) for name in model.signature.names}
    group = torch.from_numpy(of_row[index]).to(model.device)
    target = torch.zeros(len(index), *model.signature.output_shape, device=model.device)
    return CalibrationRows(inputs, torch.zeros_like(group), group, target, torch.from_numpy(boundaries))


def random_requests(signature: Signature, count: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """What chains are asked for: random but seeded values of every request port, (count, ...).

    Raises UsageError for a port of real numbers: nothing says which ones make sense.
    """
    rng = np.random.default_rng([seed, 2])

    def draw(port: Port) -> NDArray[np.int64]:
        if port.values is None:
            raise UsageError(f"'{port.name}' takes {port.dtype} values, which cannot be drawn at random.")
        return rng.integers(0, port.values - (port.null is not None), (count, *port.row_shape))

    return {port.name: draw(port) for port in signature.requests}


def renoise(
    model: LoadedModel, spec: SamplingSpec, picks: Picks, x0: NDArray[np.float32],
    requests: dict[str, NDArray[np.int64]], seed: int,
) -> CalibrationRows:  # fmt: skip
    """Rows x_t = a x_0 + b noise with known noise; picks.chain indexes x0 (B, C, ...) and the requests."""
    shape = x0.shape[1:]
    noise = np.stack([normal(seed, RENOISING + index, 0, shape) for index in range(len(picks.step))])
    a, b = (factor.reshape(-1, *[1] * len(shape)) for factor in spec.process.mix(spec.schedule.timesteps[picks.step]))
    clean = x0[picks.chain].astype(np.float64)
    states = (a * clean + b * noise).astype(np.float32)
    target = spec.process.target(clean, noise.astype(np.float64)).astype(np.float32)
    return make_rows(model, spec, picks, states, requests, target)


def make_rows(
    model: LoadedModel, spec: SamplingSpec, picks: Picks, states: NDArray[np.float32],
    requests: dict[str, NDArray[Any]], target: NDArray[np.float32],
) -> CalibrationRows:  # fmt: skip
    """The rows of each state: one, or with guidance a conditional and an unconditional one."""
    signature, each = model.signature, rows_per_image(model.guidance)

    def tensor(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.repeat(values, each, axis=0)).to(model.device)

    inputs: dict[str, Tensor] = {}
    scale = spec.schedule.input_scale[picks.step].astype(np.float32)
    for port in signature.ports:
        if port.kind == "state":
            inputs[port.name] = tensor(states * scale.reshape(-1, *[1] * (states.ndim - 1)))
        elif port.kind == "time":
            inputs[port.name] = tensor(spec.schedule.timesteps[picks.step].astype(port.dtype))
        else:
            inputs[port.name] = tensor(requests[port.name][picks.chain].astype(port.dtype))
            if each == 2 and port.null == "own":
                inputs[port.name][1::2] = torch.from_numpy(requests[f"{NEGATIVE}{port.name}"][picks.chain])
            elif each == 2 and isinstance(port.null, float | int):
                inputs[port.name][1::2] = port.null
    return CalibrationRows(
        inputs=inputs,
        step=tensor(picks.step),
        group=tensor(picks.group),
        target=tensor(target),
        boundaries=torch.from_numpy(np.asarray(picks.boundaries, np.float64)),
    )
