"""Linear layers as sums of narrower ones, so that groups of input channels have scales of their own.

A part of a layer is a linear layer NAME.columns.N like any other: whatever searches, rounds, exports and audits layers
knows nothing of groups. The parts' weights are views of the layer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from tqdit.errors import UsageError, nearest
from tqdit.models.loaded import LoadedModel
from tqdit.models.products import SumOfColumns, stand_in


def block_widths(model: LoadedModel) -> dict[str, int]:
    """Input channels of the layers that can be sums of parts: the linear layers of the network's blocks."""
    return {
        product.name: module.in_features
        for product in model.products
        if product.place == "block" and isinstance(module := model.network.get_submodule(product.name), nn.Linear)
    }  # fmt: skip


def part_widths(width: int, most: int) -> tuple[int, ...]:
    """Of the parts of at most `most` of `width` channels: equal, except for the last one if `width` is no multiple."""
    step = -(-width // -(-width // most)) if most else width
    return tuple(min(step, width - start) for start in range(0, width, step))


def narrow(model: LoadedModel, most: int, layers: Mapping[str, int] | None = None) -> LoadedModel:
    """The model with the linear layers of its blocks as sums of parts of at most `most` input channels; 0: as it is.

    layers: the number for single layers, by name; parts take that of their layer. Raises UsageError if one is no linear
    layer of a block.
    """
    layers, found = layers or {}, block_widths(model)
    whole = {name: name.rpartition(".columns.")[0] for name in found}  # '' of a layer that is no part
    if unknown := sorted(set(layers) - set(found) - set(whole.values())):
        raise UsageError(f"'{unknown[0]}' cannot be in groups of columns: it is no linear layer of this network's "
                         f"blocks. Name one such as '{nearest(unknown[0], found)}'.")  # fmt: skip
    parts = {name: part_widths(width, layers.get(name, layers.get(whole[name], most))) for name, width in found.items()}
    parts = {name: widths for name, widths in parts.items() if len(widths) > 1}
    if not parts:
        return model
    network = stand_in(model.network)
    for name, widths in parts.items():
        linear = network.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        network.set_submodule(name, SumOfColumns(linear, widths))
    products = tuple(
        product if width is None
        else replace(product, name=f"{product.name}.columns.{number}", folds=(), columns=width)
        for product in model.products
        for number, width in enumerate(parts.get(product.name, (None,)))
    )  # fmt: skip
    return replace(model, network=network, products=products)
