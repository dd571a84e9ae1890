"""Exact rewrites of the linear layers of a network's blocks, made before anything is quantized.

    y = W x + b = core(H (x / d)) + up(down(H (x / d)))        core has the weight W diag(d) H - up down, and the bias

d balances channels, H rotates them (`rotation`), up and down are a branch of low rank that stays float, and the core
may be a sum of narrower layers (`columns`). The core is a linear layer NAME.core like any other: whatever searches,
rounds, exports and audits layers knows nothing of rewrites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor, nn

from tqdit.errors import UsageError
from tqdit.models.columns import block_widths, narrow
from tqdit.models.loaded import LoadedModel
from tqdit.models.products import Product, stand_in
from tqdit.models.rotation import block_of, hadamard, rotate
from tqdit.models.weights import Changes

SHARE_OF_RANK = 8  # a branch has at most an eighth of the layer's inputs and of its outputs: 25 % of its multiply-adds

Tensors = Mapping[str, Tensor]  # of one layer: divisor (K,), or up (O, r) and down (r, K), or all three


@dataclass(frozen=True)
class Rewrites:
    """Which rewrites; the names of a network's layers follow from it.

    columns: most input channels of a product; rotate: largest block of a rotation; rank: largest rank of a branch.
    divide: layers whose input nothing else can divide do it themselves. 0 and False: none. layer_columns: rewritten
    layer -> its own number of columns.
    """

    columns: int = 0
    rotate: int = 0
    rank: int = 0
    divide: bool = False
    layer_columns: Mapping[str, int] = field(default_factory=dict)


class Rewritten(nn.Module):
    """A linear layer with its rewrites. The core and the branch get their weights from `rewrite`."""

    inverse: Tensor | None
    rotation: Tensor | None

    def __init__(self, linear: nn.Linear, rotation: Tensor | None, divisor: Tensor | None, rank: int) -> None:
        super().__init__()
        self.core = linear
        self.register_buffer("rotation", rotation, persistent=False)
        self.register_buffer("inverse", None if divisor is None else 1 / divisor, persistent=False)
        self.down = self.up = None
        if rank:
            self.down = nn.Linear(linear.in_features, rank, False, "meta")
            self.up = nn.Linear(rank, linear.out_features, False, "meta")

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., O)."""
        if self.inverse is not None:
            x = x * self.inverse
        if self.rotation is not None:
            x = rotate(x, self.rotation)
        y: Tensor = self.core(x)
        return y if self.down is None or self.up is None else y + self.up(self.down(x))


def rank_of(linear: nn.Linear, most: int) -> int:
    """The rank of a layer's branch."""
    return min(most, min(linear.in_features, linear.out_features) // SHARE_OF_RANK)


def rewrite(
    model: LoadedModel, rewrites: Rewrites, tensors: Mapping[str, Tensors] | None = None, complete: bool = False
) -> LoadedModel:
    """The model with the linear layers of its blocks rewritten; one that has been is only made narrower.

    tensors: layer -> what it needs. Branches that are not among them are zeros, or refused if `complete`. Raises
    UsageError if they do not fit the network.
    """
    if not any(isinstance(module, Rewritten) for module in model.network.modules()):
        model = _wrapped(model, rewrites, tensors or {}, complete)
    return narrow(model, rewrites.columns, rewrites.layer_columns)


def _wrapped(model: LoadedModel, rewrites: Rewrites, given: Mapping[str, Tensors], complete: bool) -> LoadedModel:
    widths = block_widths(model)
    blocks = {product.name: product for product in model.products if product.name in widths}
    for name in given.keys() - blocks.keys():
        raise UsageError(f"'layer.{name}': this network has no such layer in a block. Calibrate this model.")
    matrix = cache(lambda size: hadamard(size).to(model.device))  # one of each size
    network, changes = stand_in(model.network), Changes(model.weights)
    renamed: dict[str, Product] = {}
    for name, product in blocks.items():
        linear = network.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        block, rank = block_of(linear.in_features, rewrites.rotate), rank_of(linear, rewrites.rank)
        divides = rewrites.divide and not product.folds
        if not (block or rank or divides):
            continue
        rotation = matrix(block) if block else None
        own = {key: tensor.to(model.device, torch.float32) for key, tensor in given.get(name, {}).items()}
        _check(name, linear, rank if complete or "up" in own else 0, divides, own)
        layer = Rewritten(linear, rotation, own.get("divisor"), rank)
        _set(linear, changes.add(linear.weight, _change(rotation, own)))
        for factor, key in ((layer.up, "up"), (layer.down, "down")):
            if factor is not None:
                _set(factor, own.get(key, torch.zeros(factor.weight.shape, device=model.device)))
                factor.weight.requires_grad_(linear.weight.requires_grad)
        network.set_submodule(name, layer.eval())
        made_by = None if block else product.made_by
        renamed[name] = replace(product, name=f"{name}.core", folds=(), made_by=made_by)
    if not renamed:
        return model
    products = tuple(renamed.get(product.name, product) for product in model.products)
    return replace(model, network=network, products=products, weights=changes.weights)


def _change(rotation: Tensor | None, tensors: Tensors) -> Callable[[Tensor], Tensor]:
    """What the core's weight is made with: in float64, which holds sums of these numbers exactly in practice."""

    def change(weight: Tensor) -> Tensor:
        if "divisor" in tensors:
            weight = weight * tensors["divisor"]
        weight = weight.double()
        if rotation is not None:
            weight = rotate(weight, rotation.double())
        if "up" in tensors:
            weight = weight - tensors["up"].double() @ tensors["down"].double()
        return weight.float()

    return change


def _check(name: str, linear: nn.Linear, rank: int, divides: bool, tensors: Tensors) -> None:
    """Refuse tensors that a layer has no use for, lacks, or that do not fit it. A divisor is optional."""
    width, channels = linear.in_features, linear.out_features
    expected: dict[str, tuple[int, ...]] = {"up": (channels, rank), "down": (rank, width)} if rank else {}
    if divides and "divisor" in tensors:
        expected["divisor"] = (width,)
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if found != expected:
        raise UsageError(f"'layer.{name}' has {found or 'no tensors'}, expected {expected or 'none'}. Calibrate this "
                         "model.")  # fmt: skip


def _set(linear: nn.Linear, weight: Tensor) -> None:
    linear.weight = nn.Parameter(weight.detach(), requires_grad=linear.weight.requires_grad)
