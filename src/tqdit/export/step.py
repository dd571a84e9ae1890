"""One sampling step as a torch module: the network, guidance and the sampler's update.

This is what `--graph step` traces. Its arithmetic equals `tqdit.diffusion.ddpm_step` and `ddim_step` (tests compare).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tqdit.diffusion import SamplingSpec, step_coefficients
from tqdit.models.loaded import LoadedModel


class SamplingStep(nn.Module):
    """(x, step, class_labels, guidance_scale, noise) -> x_next.

    x, noise, x_next float (B, C, H, W); step int64 (B,) counting T-1..0, per row; class_labels int64 (B,) in
    0..num_classes; guidance_scale float (B,), or None for an unguided step.
    """

    timesteps: Tensor
    coefficients: Tensor

    def __init__(self, model: LoadedModel, spec: SamplingSpec) -> None:
        super().__init__()
        self.network = model.network
        self.adds_noise = spec.sampler == "ddpm"
        self.channels = model.in_channels
        self.learns_variance = model.learns_variance
        self.guided_channels = model.in_channels if spec.guided_channels is None else spec.guided_channels
        self.null_class = model.num_classes
        table = step_coefficients(spec.schedule, spec.sampler)
        columns = [table.from_x, table.from_eps]
        if self.learns_variance:
            columns += [table.min_log_variance, table.max_log_variance - table.min_log_variance]
        else:
            columns += [table.fixed_log_variance, np.zeros_like(table.from_x)]
        columns += [table.noise_mask]
        self.register_buffer("timesteps", torch.from_numpy(spec.schedule.timesteps.copy()))  # (T,)
        self.register_buffer("coefficients", torch.from_numpy(np.stack(columns, axis=1)).float())  # (T, 5)

    def forward(
        self, x: Tensor, step: Tensor, class_labels: Tensor, guidance_scale: Tensor | None, noise: Tensor
    ) -> Tensor:
        timestep = self.timesteps.index_select(0, step)
        if guidance_scale is None:
            output = self.network(x, timestep, class_labels)
        else:
            output = self.guide(x, timestep, class_labels, guidance_scale)
        row = self.coefficients.index_select(0, step)[:, :, None, None, None]  # (B, 5, 1, 1, 1)
        eps = output[:, : self.channels]
        mean = row[:, 0] * x + row[:, 1] * eps
        if not self.adds_noise:
            return mean
        log_variance = row[:, 2]
        if self.learns_variance:
            fraction = (output[:, self.channels :] + 1) * 0.5
            log_variance = log_variance + fraction * row[:, 3]
        return mean + row[:, 4] * torch.exp(0.5 * log_variance) * noise

    def guide(self, x: Tensor, timestep: Tensor, class_labels: Tensor, scale: Tensor) -> Tensor:
        """Conditional and unconditional rows in one call of the network; u + scale (c - u) on the guided channels."""
        labels = torch.cat([class_labels, torch.full_like(class_labels, self.null_class)])
        both = self.network(torch.cat([x, x]), torch.cat([timestep, timestep]), labels)
        conditional, unconditional = both[: x.shape[0]], both[x.shape[0] :]
        c, u = conditional[:, : self.guided_channels], unconditional[:, : self.guided_channels]
        return torch.cat([u + scale[:, None, None, None] * (c - u), conditional[:, self.guided_channels :]], dim=1)
