"""What a calibration costs, in multiply-adds over those of one row's forward pass."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import zip_longest
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from tqdit.models.loaded import LoadedModel, in_one_line
from tqdit.models.products import stand_in, watched


@dataclass(frozen=True)
class ProductCost:
    """Of one row in one product: multiply-adds, and the size of each operand that is not a weight."""

    multiply_adds: int = 0
    elements: tuple[int, ...] = ()


_found: WeakKeyDictionary[nn.Module, dict[str, ProductCost]] = WeakKeyDictionary()  # of networks that are in use


def product_costs(model: LoadedModel) -> dict[str, ProductCost]:
    """Of each product of the network, for one row; a network is observed once."""
    costs = _found.get(model.network)
    if costs is None or costs.keys() != {product.name for product in model.products}:
        costs = _found[model.network] = _observe(model)
    return dict(costs)


def _observe(model: LoadedModel) -> dict[str, ProductCost]:
    costs = {product.name: ProductCost() for product in model.products}

    def add(name: str, module: nn.Module, operands: tuple[Tensor, ...], output: Tensor) -> None:
        weight = getattr(module, "weight", None)
        contracted = operands[0].shape[-1] if weight is None else weight[0].numel()
        sizes = zip_longest(costs[name].elements, (operand.numel() for operand in operands), fillvalue=0)
        costs[name] = ProductCost(costs[name].multiply_adds + output.numel() * contracted, tuple(map(sum, sizes)))

    network, fake = stand_in(model.network), FakeTensorMode(allow_non_fake_inputs=True)
    one = {name: torch.from_numpy(array).to(model.device) for name, array in model.signature.zeros(1).items()}
    refused = in_one_line(model.source, "a call with 1 row")
    with refused, watched(network, costs, add), torch.no_grad(), fake:
        network(**tree_map_only(Tensor, fake.from_tensor, model.arguments(one)))
    return costs


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
