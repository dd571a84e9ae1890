"""Linear layers as sums of narrower ones, so that groups of input channels have scales of their own.

A part of a layer is a linear layer NAME.columns.N like any other: whatever searches, rounds, exports and audits layers
knows nothing of groups. The parts' weights are views of the layer's.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from tqdit.models.loaded import LoadedModel
from tqdit.models.products import SumOfColumns, stand_in


def widths_of(width: int, most: int) -> tuple[int, ...]:
    """Of the parts of a layer of `width` input channels; one if it stays whole."""
    step = -(-width // -(-width // most)) if most else width
    return tuple(min(step, width - start) for start in range(0, width, step))


def narrow(model: LoadedModel, most: int) -> LoadedModel:
    """The model with the linear layers of its blocks as sums of parts of at most `most` input channels; 0: as it is.

    Parts are equally wide, but for the last one if the width is no multiple of their number.
    """
    wide = {
        product.name: module.in_features
        for product in model.products
        if product.place == "block" and isinstance(module := model.network.get_submodule(product.name), nn.Linear)
        and 0 < most < module.in_features
    }  # fmt: skip
    if not wide:
        return model
    network = stand_in(model.network)
    parts = {}
    for name, width in wide.items():
        widths = widths_of(width, most)
        linear = network.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        network.set_submodule(name, SumOfColumns(linear, widths))
        parts[name] = widths
    products = tuple(
        product if width is None
        else replace(product, name=f"{product.name}.columns.{number}", folds=(), columns=width)
        for product in model.products
        for number, width in enumerate(parts.get(product.name, (None,)))
    )  # fmt: skip
    return replace(model, network=network, products=products)
