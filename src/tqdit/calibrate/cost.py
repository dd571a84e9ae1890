"""What a calibration costs, in multiply-adds over those of one row's forward pass."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tqdit.calibrate.layers import find_layers
from tqdit.models import LoadedModel
from tqdit.models.products import Scores, ValueProduct


def multiply_adds(model: LoadedModel) -> dict[str, int]:
    """Of each product of the network, for one row."""
    counts: dict[str, int] = {}
    modules = {layer.name: model.network.get_submodule(layer.name) for layer in find_layers(model.network)}

    def hook(name: str) -> Any:
        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, Scores | ValueProduct):
                contracted = inputs[0].shape[-1]
            else:
                assert isinstance(module, nn.Linear | nn.Conv2d)
                contracted = module.weight[0].numel()
            counts[name] = output.numel() * contracted

        return count

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    with torch.no_grad():
        x = torch.zeros(1, model.in_channels, model.height, model.width, device=model.device)
        zero = torch.zeros(1, dtype=torch.int64, device=model.device)
        model.network(x, zero, zero)
    for handle in handles:
        handle.remove()
    return counts


@dataclass
class Meter:
    """Multiply-adds that this process spent, by phase. Work that a resumed run found on disk is not in it."""

    per_row: dict[str, int]
    spent: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, count: float) -> None:
        self.spent[phase] = self.spent.get(phase, 0.0) + count

    def forward(self, phase: str, rows: int, layers: list[str] | None = None) -> None:
        """Forward passes through some layers, or all."""
        self.add(phase, rows * sum(self.per_row[name] for name in (self.per_row if layers is None else layers)))

    def backward(self, phase: str, rows: int, layers: list[str]) -> None:
        """Gradients of inputs alone: one product per linear layer, two per product of attention."""
        products = sum(self.per_row[name] * (2 if name.endswith(("scores", "value_product")) else 1) for name in layers)
        self.add(phase, rows * products)

    @property
    def forward_equivalents(self) -> dict[str, float]:
        one = sum(self.per_row.values())
        return {phase: count / one for phase, count in self.spent.items()}


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
