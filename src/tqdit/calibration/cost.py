"""What a calibration costs, in multiply-adds over those of one row's forward pass."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tqdit.models.loaded import LoadedModel
from tqdit.models.products import Scores, ValueProduct


def multiply_adds(model: LoadedModel) -> dict[str, int]:
    """Of each product of the network, for one row."""
    counts: dict[str, int] = {}

    def hook(name: str) -> Any:
        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, Scores | ValueProduct):
                contracted = inputs[0].shape[-1]
            else:
                weight = module.weight
                assert isinstance(weight, Tensor)
                contracted = weight[0].numel()
            counts[name] = counts.get(name, 0) + output.numel() * contracted

        return count

    names = [product.name for product in model.products]
    handles = [model.network.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        model(model.signature.zeros(1))
    finally:
        for handle in handles:
            handle.remove()
    return counts


@dataclass
class Meter:
    """Multiply-adds that this process spent, by phase. Work that a resumed run found on disk is not in it."""

    per_row: dict[str, int]  # of each product
    spent: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, count: float) -> None:
        self.spent[phase] = self.spent.get(phase, 0.0) + count

    def forward(self, phase: str, rows: int) -> None:
        self.add(phase, rows * sum(self.per_row.values()))

    def backward(self, phase: str, rows: int) -> None:
        """Gradients of inputs alone: one product per linear layer, two per product of attention."""
        attention = ("scores", "value_product")
        self.add(phase, rows * sum(n * (2 if name.endswith(attention) else 1) for name, n in self.per_row.items()))

    @property
    def forward_equivalents(self) -> dict[str, float]:
        one = sum(self.per_row.values())
        return {phase: count / one for phase, count in self.spent.items()}


def peak_memory_bytes() -> int | None:
    """Largest resident set of this process so far; None if the system does not say."""
    try:
        import resource  # which Windows does not have
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
