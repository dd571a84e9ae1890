"""Channel equalisation, folded: dividing a layer's input costs nothing where what makes that input can do it.

    qkv, fc1, final linear   x = norm (unit + scale) + shift: adaLN's rows of scale and shift, and the unit, are divided
    proj                     x = P v: the rows of v in qkv are divided, so v is quantized with equalised channels, too

The layer's own weight is multiplied by the divisors, and the network computes what it did, up to rounding. All that
quantizes works on the folded network and knows nothing of divisors. What follows a nonlinearity (fc2 after GELU, adaLN
after SiLU) has no place to fold into.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from tqdit.errors import UsageError
from tqdit.models import LoadedModel
from tqdit.models.dit import Attention, DiTBlock, FinalLayer, Modulation
from tqdit.quantization.table import ScaleTable

Divide = Callable[[Tensor], None]


def fold(model: LoadedModel, table: ScaleTable) -> tuple[LoadedModel, ScaleTable]:
    """The network that a table's sites describe, and the table without its divisors.

    Raises UsageError where a divisor belongs to no layer that can be equalised, or does not fit it.
    """
    divided = {site.module: site.divisor for site in table.sites if site.divisor is not None}
    if not divided:
        return model, table
    divisors = {name: torch.from_numpy(np.array(divisor)).to(model.device) for name, divisor in divided.items()}
    network = fold_divisors(model.network, divisors)
    return replace(model, network=network), replace(table, sites=tuple(replace(s, divisor=None) for s in table.sites))


def fold_divisors(network: nn.Module, divisors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `network` in which the inputs of the layers named come divided by (K,); it shares all other weights."""
    if not divisors:
        return network
    shared = {id(parameter): parameter for parameter in network.parameters()}
    folded = copy.deepcopy(network, shared)
    for name, divisor in sorted(divisors.items()):  # in one order, so that the last bits are always the same
        divide = source_of(folded, name)
        linear = dict(folded.named_modules()).get(name)
        if divide is None or not isinstance(linear, nn.Linear):
            raise UsageError(f"the scale table divides the input of '{name}', which nothing before it can do. "
                             "Calibrate again.")  # fmt: skip
        if divisor.shape != (linear.in_features,):
            raise UsageError(f"'{name}.input.divisor' has {len(divisor)} entries, which do not fit the layer. "
                             "Calibrate this model.")  # fmt: skip
        divide(divisor)
        _set(linear, linear.weight * divisor, linear.bias)
    return folded


def source_of(network: nn.Module, name: str) -> Divide | None:
    """What divides the channels of a layer's input, or None where they cannot be folded into what makes them."""
    owner, _, leaf = name.rpartition(".")
    modules = dict(network.named_modules())
    match modules.get(owner), modules.get(owner.rpartition(".")[0]), leaf:
        case (Attention() as attention, _, "proj"):
            return lambda divisor: _divide_rows(attention.qkv, {2: divisor})
        case (Attention(), DiTBlock() as block, "qkv"):
            return lambda divisor: _divide_modulation(block.modulation1, block.adaLN_modulation[1], 0, divisor)
        case (_, DiTBlock() as block, "fc1"):
            return lambda divisor: _divide_modulation(block.modulation2, block.adaLN_modulation[1], 3, divisor)
        case (FinalLayer() as final, _, "linear"):
            return lambda divisor: _divide_modulation(final.modulation, final.adaLN_modulation[1], 0, divisor)
    return None


def _divide_modulation(modulation: Modulation, adaln: nn.Module, shift: int, divisor: Tensor) -> None:
    """(norm (unit + scale) + shift) / divisor; `shift` is the chunk of adaLN's output that scale follows."""
    assert isinstance(adaln, nn.Linear)
    modulation.unit = modulation.unit / divisor
    _divide_rows(adaln, {shift: divisor, shift + 1: divisor})


def _divide_rows(linear: nn.Linear, chunks: Mapping[int, Tensor]) -> None:
    """Divide some chunks, each of D outputs, by (D,)."""
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    for index, divisor in chunks.items():
        rows = slice(index * len(divisor), (index + 1) * len(divisor))
        weight[rows] /= divisor[:, None]
        bias[rows] /= divisor
    _set(linear, weight, bias)


def _set(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Give a layer new parameters; those that it had belong to other networks as well."""
    trains = linear.weight.requires_grad
    linear.weight = nn.Parameter(weight.detach(), requires_grad=trains)
    linear.bias = nn.Parameter(bias.detach(), requires_grad=trains)
