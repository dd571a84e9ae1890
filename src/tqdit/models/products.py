"""The products of attention as modules, so that each tensor that a quantizer wants is some module's input or output."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Scores(nn.Module):
    """q kᵀ / sqrt(d). q and k (N, heads, T, d); result (N, heads, T, T)."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k.transpose(-2, -1)) * (q.shape[-1] ** -0.5)


class ValueProduct(nn.Module):
    """Probabilities (N, heads, T, T) times v (N, heads, T, d)."""

    def forward(self, probabilities: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(probabilities, v)
