"""The fake-quantized network: the definition of what an export of a scale table must compute.

Integers are simulated in float32 in exactly the order of operations of docs/scale-table.md, so that an export of the
same table gets the same codes. Each row of a batch takes the scales of its own timestep's group.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tqdit.errors import UsageError
from tqdit.golden import GoldenCalls, relative_errors
from tqdit.models.loaded import LoadedModel
from tqdit.models.products import Convolution, Scores, ValueProduct, is_linear, patches, prediction_of, stand_in
from tqdit.models.weights import IN_MEMORY, Changes
from tqdit.quantization.fold import fold
from tqdit.quantization.granularity import PerChannel
from tqdit.quantization.quantizer import Part, Quantizer, factor_scales
from tqdit.quantization.rounding import codes, rounded
from tqdit.quantization.table import ScaleTable, Site


def apply(model: LoadedModel, table: ScaleTable) -> LoadedModel:
    """`model` with every site of `table` quantized; the weights of the other modules are shared, not copied.

    Raises UsageError if the table is for another model or names what the network does not have.
    """
    table.check_model(model.fingerprint, model.source)
    model, table = fold(model, table)
    changes = Changes(model.weights)
    network = QuantizedNetwork(model.network, table, model.signature.time.name, changes).eval()
    return replace(model, network=network, weights=changes.weights)


def golden_calls(model: LoadedModel, table: ScaleTable, inputs: Mapping[str, NDArray[Any]]) -> GoldenCalls:
    """The calls `inputs` (ports, (K, ...)) with what the float model gives, and the quantized one's error."""
    quantized = apply(model, table)
    count = len(inputs[model.signature.state.name])
    calls = [{name: array[call : call + 1] for name, array in inputs.items()} for call in range(count)]
    prediction = np.concatenate([model(call) for call in calls])
    found = np.concatenate([quantized(call) for call in calls])
    return GoldenCalls(dict(inputs), prediction, relative_errors(found, prediction))


class QuantizedNetwork(nn.Module):
    """Ports by name to the prediction, like the network that it copies. time: name of the port that tells the timestep.

    A network with a table that has divisors must be folded before (`apply` does it). changes: of weights that stay in
    their file; those of the quantized network are added.
    """

    boundaries: Tensor

    def __init__(self, network: nn.Module, table: ScaleTable, time: str, changes: Changes | None = None) -> None:
        super().__init__()
        self.time = time
        assert all(site.divisor is None for site in table.sites)
        self.rows = RowGroups()
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
        self.network = stand_in(network)
        self.register_buffer("boundaries", torch.from_numpy(table.boundaries.copy()), persistent=False)
        for name, sites in table.by_module.items():
            quantized = quantize_module(name, find_module(self.network, name), sites, self.rows, changes)
            parent, _, leaf = name.rpartition(".")
            setattr(self.network.get_submodule(parent), leaf, quantized)
        self.to(device)

    def forward(self, **ports: Tensor) -> Tensor:
        time = ports[self.time]
        time = time if time.ndim == 1 else time.flatten(1).amax(1)  # of several for a row, such as one for each frame
        groups = (time[:, None] >= self.boundaries[None]).sum(1)  # (N,)
        with self.rows.set(groups):
            return prediction_of(self.network(**ports))


class RowGroups:
    """The group of each row of the batch that a network is working on, one value per thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __reduce__(self) -> tuple[type[RowGroups], tuple[()]]:
        return RowGroups, ()  # a copy or a pickle of the network starts between two batches

    @contextlib.contextmanager
    def set(self, groups: Tensor) -> Iterator[None]:
        self._local.groups = groups
        try:
            yield
        finally:
            del self._local.groups

    def select(self, table: Tensor, ndim: int) -> Tensor:
        """The entry of `table` (G,) for each row, shaped (N, 1, ...) with `ndim` dimensions."""
        groups: Tensor = self._local.groups
        return table.index_select(0, groups).reshape(-1, *[1] * (ndim - 1))


class QuantizedOperand(nn.Module):
    """One quantized tensor of a product, by its scheme's form. It is the form's `Arithmetic` for torch.

    Every constant is a buffer; of a scale with an entry per group, s_ref and r are buffers too.
    """

    def __init__(self, quantizer: Quantizer, rows: RowGroups) -> None:
        super().__init__()
        self.quantizer, self.rows = quantizer, rows
        for name, array in quantizer.constants().items():
            self._hold(name, array)
            if array.ndim and name in quantizer.tensors:
                reference, ratio = factor_scales(array)
                self._hold(f"{name}_reference", reference)
                self._hold(f"{name}_ratio", ratio)

    def _hold(self, name: str, array: NDArray[np.float32]) -> None:
        self.register_buffer(f"held_{name}", torch.from_numpy(np.array(array)), persistent=False)

    def parts(self, x: Tensor) -> Iterator[Part[Tensor]]:
        """The terms of x^."""
        return self.quantizer.torch_parts(self, x)

    def constant(self, name: str, x: Tensor) -> Tensor:
        held = self.get_buffer(f"held_{name}")
        return self.rows.select(held, x.ndim) if held.ndim else held

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def subtract(self, x: Tensor, y: Tensor) -> Tensor:
        return x - y

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def divide(self, x: Tensor, y: Tensor) -> Tensor:
        return x / y

    def maximum(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.maximum(x, y)

    def minimum(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.minimum(x, y)

    def absolute(self, x: Tensor) -> Tensor:
        return x.abs()

    def largest(self, x: Tensor) -> Tensor:
        return x.amax(-1, keepdim=True)

    def smallest(self, x: Tensor) -> Tensor:
        return x.amin(-1, keepdim=True)

    def negative(self, x: Tensor) -> Tensor:
        return x.clamp(max=0)

    def positive(self, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    def rounded(self, x: Tensor, scale: str) -> Part[Tensor]:
        held, bits = self.get_buffer(f"held_{scale}"), self.quantizer.code_bits
        if not held.ndim:
            return Part(rounded(x, held, bits))
        ratio = self.constant(f"{scale}_ratio", x)
        return Part(rounded(x / ratio, self.get_buffer(f"held_{scale}_reference"), bits), ratio)


def multiply(parts: Iterable[Part[Tensor]], product: Callable[[Tensor], Tensor], row_sums: Tensor | None) -> Tensor:
    """x^ times another operand: `product` of the values of each part. row_sums: of that operand, if it is a weight."""
    terms = []
    for part in parts:
        term = product(part.values)
        if part.ratio is not None:
            term = term * part.ratio
        if part.offset is not None:
            assert row_sums is not None
            term = term + part.offset * row_sums
        terms.append(term)
    return functools.reduce(torch.add, terms)


class QuantizedLinear(nn.Module):
    """A linear layer or a convolution that is one on patches, with W^ for its weight. The bias comes last."""

    row_sums: Tensor
    bias: Tensor | None

    def __init__(
        self, module: nn.Linear | Convolution, weight: Tensor, quantize: QuantizedOperand | None, changes: Changes
    ) -> None:
        super().__init__()
        plain = {name: value for name, value in vars(module).items() if isinstance(value, int | tuple)}
        vars(self).update(plain)  # networks look at out_channels and the like
        self.patch = tuple(weight.shape[2:])  # () of a linear layer
        self.weight = nn.Parameter(weight, requires_grad=False)  # networks look at the dtype of their parameters
        weights = changes.weights
        self.register_buffer("row_sums", weights.read(weight).flatten(1).sum(1), persistent=False)
        bias = None if module.bias is None else weights.read(module.bias)
        self.register_buffer("bias", bias, persistent=False)
        self.quantize = quantize

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        grid = [side // step for side, step in zip(x.shape[2:], self.patch, strict=True)] if self.patch else []
        x = patches(x, self.patch) if self.patch else x  # tokens, of C p p channels
        y = self.product(x) if self.quantize is None else multiply(self.quantize.parts(x), self.product, self.row_sums)
        y = y if self.bias is None else y + self.bias
        return y.transpose(1, 2).reshape(len(y), -1, *grid) if self.patch else y


class QuantizedProduct(nn.Module):
    """A product of attention: q^ k^T / sqrt(d), or P^ v^. left and right (N, heads, T, ...)."""

    def __init__(self, module: Scores | ValueProduct, left: QuantizedOperand, right: QuantizedOperand) -> None:
        super().__init__()
        self.is_scores = isinstance(module, Scores)
        self.left, self.right = left, right

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        (other,) = self.right.parts(right)  # schemes of the role right have one part, without an offset
        values = other.values.transpose(-2, -1) if self.is_scores else other.values
        y = multiply(self.left.parts(left), lambda x: torch.matmul(x, values), None)
        y = y if other.ratio is None else y * other.ratio
        return y * (left.shape[-1] ** -0.5) if self.is_scores else y


def find_module(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError as error:
        raise UsageError(f"the scale table names '{name}', which the network lacks. Calibrate again.") from error


def quantize_module(
    name: str, module: nn.Module, sites: Mapping[str, Site], rows: RowGroups, changes: Changes | None = None
) -> nn.Module:
    """The quantized form of one module of the network; changes: as in `QuantizedNetwork`."""
    changes = Changes(IN_MEMORY) if changes is None else changes
    expected = {"left", "right"} if isinstance(module, Scores | ValueProduct) else {"weight", "input"}
    if not isinstance(module, nn.Linear | Convolution | Scores | ValueProduct) or not set(sites) <= expected:
        raise UsageError(f"the scale table quantizes {sorted(sites)} of '{name}', a {type(module).__name__}. "
                         "Calibrate again.")  # fmt: skip
    operands = {role: QuantizedOperand(site.quantizer, rows) for role, site in sites.items() if role != "weight"}
    if isinstance(module, Scores | ValueProduct):
        if set(sites) != expected:
            raise UsageError(f"the scale table quantizes only {sorted(sites)} of the product '{name}'. "
                             "Calibrate again.")  # fmt: skip
        return QuantizedProduct(module, operands["left"], operands["right"])
    if not is_linear(module):
        raise UsageError(f"'{name}' is a convolution with padding, groups or a stride that is not its kernel, which "
                         "stays float. Leave it out.")  # fmt: skip
    weight = module.weight.detach()
    if "weight" in sites:
        weight = changes.add(weight, lambda values: torch.mul(*weight_codes(values, sites["weight"])))
    return QuantizedLinear(module, weight, operands.get("input"), changes)


def weight_codes(weight: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """(codes, scale) of a weight, float32: its stored codes, or those of rounding to nearest. scale broadcasts."""
    scale = weight_scale(weight.shape, site).to(weight.device)
    if site.codes is None:
        return codes(weight, scale, site.quantizer.bits), scale
    return torch.from_numpy(site.codes.astype(np.float32)).to(weight.device), scale


def weight_scale(shape: Sequence[int], site: Site) -> Tensor:
    """The scale of a weight of this shape, float32; it broadcasts. Raises UsageError if the site does not fit."""
    scale = torch.from_numpy(np.array(site.quantizer.arrays()["scale"]))
    if isinstance(site.quantizer.granularity, PerChannel):
        axis = site.quantizer.granularity.axis
        if axis >= len(shape) or shape[axis] != len(scale):
            raise UsageError(
                f"'{site.name}' has {len(scale)} scales, the weight of shape {tuple(shape)} needs one per index "
                f"of axis {axis}. Calibrate this model."
            )
        scale = scale.reshape([-1 if dim == axis else 1 for dim in range(len(shape))])
    if site.codes is not None and site.codes.shape != tuple(shape):
        raise UsageError(f"'{site.name}.codes' has shape {site.codes.shape}, the weight {tuple(shape)}. "
                         "Calibrate this model.")  # fmt: skip
    return scale
