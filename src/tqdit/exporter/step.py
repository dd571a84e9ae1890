"""One sampling step as a torch module: the network, guidance and the sampler's update.

This is what `--graph step` traces. It computes what `sampling.chains` does on the host, from the same table.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from tqdit.errors import UsageError
from tqdit.exporter.passes.scopes import TIMESTEPS
from tqdit.exporter.trace import EXAMPLE_BATCH
from tqdit.models.loaded import LoadedModel
from tqdit.models.products import prediction_of
from tqdit.ports import Port, Signature
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.process import Recorded
from tqdit.sampling.schedule import SamplingSpec

STATE, OUTPUT, NOISE, LOW, SPREAD, INPUT_SCALE = range(6)  # columns of a step's coefficients


class SamplingStep(nn.Module):
    """(x, step, the network's request ports, guidance_scale, noise) -> x_next.

    x, noise, x_next float (B, C, ...); step int64 (B,) counting T-1..0, per row; guidance_scale float (B,), left out
    without guidance. The result of a schedule without noise does not depend on `noise`.
    """

    timesteps: Tensor
    coefficients: Tensor

    def __init__(self, model: LoadedModel, spec: SamplingSpec, guidance: Guidance | None) -> None:
        super().__init__()
        if isinstance(spec.process, Recorded):
            raise UsageError(
                f"a step graph takes classes and their guidance; {model.signature.family} was recorded in a pipeline. "
                "Export with --graph denoiser."
            )
        self.network, self.signature, self.guidance = model.network, model.signature, guidance
        schedule, dtype = spec.schedule, model.signature.time.dtype
        if schedule.lag:
            raise UsageError(
                f"a step of '{spec.sampler}' looks back at {schedule.lag} steps before it, which a step graph cannot. "
                "Export with --graph denoiser, or pass another --sampler."
            )
        self.adds_noise, self.learns_variance = schedule.is_stochastic, schedule.log_variance is not None
        self.scales_input = bool(np.any(schedule.input_scale != 1))
        low, high = schedule.log_variance or (np.zeros(len(schedule)), np.zeros(len(schedule)))
        columns = [schedule.state_weights[:, 0], schedule.output_weights[:, 0], schedule.noise_weight, low, high - low,
                   schedule.input_scale]  # fmt: skip
        self.register_buffer(TIMESTEPS, torch.from_numpy(schedule.timesteps.astype(dtype)))  # (T,)
        self.register_buffer("coefficients", torch.from_numpy(np.stack(columns, axis=1)).float())  # (T, 6)

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(step_inputs(self.signature, self.guidance), inputs, strict=True))
        x, step, noise = given["x"], given["step"], given["noise"]
        row = self.coefficients.index_select(0, step).reshape(-1, INPUT_SCALE + 1, *[1] * (x.ndim - 1))
        output = self.predict(given, x * row[:, INPUT_SCALE] if self.scales_input else x)
        channels = self.signature.channels
        mean = row[:, STATE] * x + row[:, OUTPUT] * output[:, :channels]
        if not self.adds_noise:
            return mean
        if not self.learns_variance:
            return mean + row[:, NOISE] * noise
        log_variance = row[:, LOW] + (output[:, channels:] + 1) * 0.5 * row[:, SPREAD]
        return mean + row[:, NOISE] * torch.exp(0.5 * log_variance) * noise

    def predict(self, given: Mapping[str, Tensor], state: Tensor) -> Tensor:
        """The prediction, guided: u + scale (c - u) on the guided channels, from one call of the network."""
        ports = {port.name: given[port.name] for port in self.signature.requests}
        told = self.timesteps.index_select(0, given["step"])
        ports |= {self.signature.state.name: state, self.signature.time.name: told}
        if self.guidance is None:
            return prediction_of(self.network(**ports))
        both = {port.name: torch.cat([ports[port.name], unconditional(port, ports[port.name])])
                for port in self.signature.ports}  # fmt: skip
        output, rows = prediction_of(self.network(**both)), state.shape[0]
        c, u = output[:rows], output[rows:]
        moved = self.signature.channels if self.guidance.channels is None else self.guidance.channels
        scale = given["guidance_scale"].reshape(-1, *[1] * (u.ndim - 1))
        return torch.cat([u[:, :moved] + scale * (c[:, :moved] - u[:, :moved]), c[:, moved:]], dim=1)


def unconditional(port: Port, values: Tensor) -> Tensor:
    """What a port holds in the unconditional rows."""
    return torch.full_like(values, port.null) if isinstance(port.null, float | int) else values


def step_inputs(signature: Signature, guidance: Guidance | None) -> dict[str, Tensor]:
    """Example inputs of a step graph, in their order."""
    x = torch.zeros(EXAMPLE_BATCH, *signature.state.row_shape)
    requests = {port.name: torch.from_numpy(port.zeros(EXAMPLE_BATCH)) for port in signature.requests}
    scale = {} if guidance is None else {"guidance_scale": torch.ones(EXAMPLE_BATCH)}
    step = torch.zeros(EXAMPLE_BATCH, dtype=torch.int64)
    return {"x": x, "step": step} | requests | scale | {"noise": x.clone()}
