"""Channel equalisation, folded: dividing a layer's input costs nothing if what makes that input can do it.

A product's `folds` (tqdit.models.products) say which rows of which linear layers make its input channels: adaLN's shift
and scale, or the rows of v. Those rows are divided, the product's own weight is multiplied, and the network computes
what it did, up to rounding. Everything that quantizes works on the folded network and knows nothing of divisors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from tqdit.errors import UsageError
from tqdit.models.folds import Fold
from tqdit.models.loaded import LoadedModel
from tqdit.models.products import stand_in
from tqdit.models.rewrites import Rewrites, Tensors, rewrite
from tqdit.models.weights import Changes
from tqdit.quantization.table import Arrays, ScaleTable


def fold(model: LoadedModel, table: ScaleTable) -> tuple[LoadedModel, ScaleTable]:
    """The network that a table's sites describe, its layers rewritten, and the table without what that took.

    Raises UsageError if a divisor belongs to no layer that can be equalised, or anything does not fit its layer.
    """
    columns, rotate, rank = (table.count(name) for name in ("columns", "rotate", "rank"))
    rewrites = Rewrites(columns, rotate, rank, table.settings.get("equalize_all") is True)
    layers = {
        name: {key: torch.from_numpy(np.array(array)).to(model.device) for key, array in arrays.items()}
        for name, arrays in (*table.layers.items(), *_divided(table).items())
    }
    if not layers and rewrites == Rewrites():
        return model, table
    sites = tuple(replace(site, divisor=None) for site in table.sites)
    return fold_layers(model, rewrites, layers), replace(table, sites=sites, layers={})


def _divided(table: ScaleTable) -> dict[str, Arrays]:
    return {site.module: {"divisor": site.divisor} for site in table.sites if site.divisor is not None}


def fold_layers(
    model: LoadedModel, rewrites: Rewrites, layers: Mapping[str, Tensors], complete: bool = True
) -> LoadedModel:
    """The model with divisors folded, then rewritten (`tqdit.models.rewrites`). layers: module -> its tensors."""
    places = {product.name for product in model.products if product.folds or not rewrites.divide}
    rest = {name: dict(tensors) for name, tensors in layers.items()}
    divisors = {name: own.pop("divisor") for name, own in rest.items() if "divisor" in own and name in places}
    rest = {name: own for name, own in rest.items() if own}
    return rewrite(fold_divisors(model, divisors), rewrites, rest, complete)


def fold_divisors(model: LoadedModel, divisors: Mapping[str, Tensor]) -> LoadedModel:
    """A model that computes the same with inputs of products divided by (K,) each; it shares the other weights."""
    if not divisors:
        return model
    changes = Changes(model.weights)
    network = stand_in(model.network)
    products = {product.name: product for product in model.products}
    for name, divisor in sorted(divisors.items()):  # in one order, so that the last bits are always the same
        folds = products[name].folds if name in products else ()
        if not folds:
            raise UsageError(f"'{name}.divisor': this network has no place for it. Calibrate this model.")
        linear = _linear(network, name)
        if divisor.shape != (linear.in_features,):
            raise UsageError(
                f"'{name}.divisor' has shape {tuple(divisor.shape)}, its layer has {linear.in_features} inputs. "
                "Calibrate this model."
            )
        _set(linear, changes.add(linear.weight, partial(torch.mul, divisor)), linear.bias)
        for place in folds:
            _divide_rows(_linear(network, place.module), place, divisor, changes)
    return replace(model, network=network, weights=changes.weights)


def _linear(network: nn.Module, name: str) -> nn.Linear:
    module = network.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _divide_rows(linear: nn.Linear, place: Fold, divisor: Tensor, changes: Changes) -> None:
    """(offset + W x + b) / d = offset + (W / d) x + b / d + offset (1 / d - 1)."""
    rows = slice(place.start, place.stop)

    def divide(weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight[rows] /= divisor[:, None]
        return weight

    weight = changes.add(linear.weight, divide)
    given: Tensor | None = linear.bias
    has_bias = given is not None
    bias = torch.zeros(len(weight), device=weight.device) if given is None else changes.weights.read(given).clone()
    bias[rows] = bias[rows] / divisor + place.offset * (1 / divisor - 1)
    _set(linear, weight, bias if has_bias or place.offset else None)


def _set(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer new parameters; those that it had belong to other networks as well."""
    trains = linear.weight.requires_grad
    linear.weight = nn.Parameter(weight.detach(), requires_grad=trains)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=trains)
