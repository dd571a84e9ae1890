"""Linear layers as sums of narrower ones, so that groups of input channels have scales of their own.

A part of a layer is a linear layer NAME.columns.N like any other: whatever searches, rounds, exports and audits layers
knows nothing of groups. The parts' weights are views of the layer's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from tqdit.models.loaded import LoadedModel
from tqdit.models.products import Product, SumOfColumns, stand_in

_PART = re.compile(r"(.+)\.columns\.(\d+)")


def narrow(model: LoadedModel, most: int) -> LoadedModel:
    """The model with the linear layers of its blocks as sums of parts of at most `most` input channels; 0: as it is."""
    counts = {}
    for product in model.products:
        module = model.network.get_submodule(product.name)
        if most and product.place == "block" and isinstance(module, nn.Linear):
            counts[product.name] = -(-module.in_features // most)
    return split(model, {name: count for name, count in counts.items() if count > 1})


def parts_named(model: LoadedModel, modules: Iterable[str]) -> dict[str, int]:
    """Linear layer of the model -> the number of its parts that these modules name."""
    counts: dict[str, int] = {}
    names = {product.name for product in model.products}
    for module in modules:
        match = _PART.fullmatch(module)
        if match is not None and match[1] in names:
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return counts


def split(model: LoadedModel, counts: Mapping[str, int]) -> LoadedModel:
    """The model with these linear layers as sums of so many parts, equally wide but for the last one."""
    if not counts:
        return model
    network = stand_in(model.network)
    products: list[Product] = []
    for product in model.products:
        if product.name not in counts:
            products.append(product)
            continue
        linear = network.get_submodule(product.name)
        assert isinstance(linear, nn.Linear)
        width = -(-linear.in_features // counts[product.name])
        starts = range(0, linear.in_features, width)
        widths = tuple(min(width, linear.in_features - start) for start in starts)
        network.set_submodule(product.name, SumOfColumns(linear, widths))
        products += [
            replace(product, name=f"{product.name}.columns.{number}", folds=(), columns=part)
            for number, part in enumerate(widths)
        ]
    return replace(model, network=network, products=tuple(products))
