"""The fake-quantized network: the definition of what an export of a scale table must compute.

Integers are simulated in float32 in exactly the order of operations of docs/scale-table.md, so that an export of the
same table gets the same codes. Each row of a batch takes the scales of its own timestep's group.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tqdit.errors import UsageError
from tqdit.models.loaded import LoadedModel
from tqdit.models.products import Scores, ValueProduct
from tqdit.quantization.fold import fold
from tqdit.quantization.quantizers import softmax_regions, symmetric, symmetric_codes
from tqdit.quantization.table import (
    Asymmetric,
    PerChannel,
    PerTimestepGroup,
    Quantizer,
    ScaleTable,
    Site,
    Symmetric,
    TwoRegionGelu,
    TwoRegionSoftmax,
    factor_steps,
)


def apply(model: LoadedModel, table: ScaleTable) -> LoadedModel:
    """`model` with every site of `table` quantized; the weights of the other modules are shared, not copied.

    Raises UsageError if the table is for another model or names what the network does not have.
    """
    table.check_model(model.fingerprint, model.source)
    model, table = fold(model, table)
    return replace(model, network=QuantizedNetwork(model.network, table).eval())


class QuantizedNetwork(nn.Module):
    """(x (N, C, H, W), timestep (N,), class_labels (N,)) -> (N, K, H, W), like the network that it copies.

    A network with a table that has divisors must be folded before (`apply` does it).
    """

    boundaries: Tensor

    def __init__(self, network: nn.Module, table: ScaleTable) -> None:
        super().__init__()
        assert all(site.divisor is None for site in table.sites)
        self.rows = RowGroups()
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
        shared = {id(tensor): tensor for tensor in network.parameters()}
        self.network = copy.deepcopy(network, shared)
        self.register_buffer("boundaries", torch.from_numpy(table.boundaries.copy()), persistent=False)
        for name, sites in table.by_module.items():
            quantized = quantize_module(name, find_module(self.network, name), sites, self.rows)
            parent, _, leaf = name.rpartition(".")
            setattr(self.network.get_submodule(parent), leaf, quantized)
        self.to(device)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        groups = (timestep[:, None] >= self.boundaries[None]).sum(1)  # (N,)
        with self.rows.set(groups):
            output: Tensor = self.network(x, timestep, class_labels)
        return output


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


class Step(nn.Module):
    """A step s[g] = s_ref r[g], s_ref = max s[g]; with one scale r = 1 and is left out."""

    reference: Tensor
    ratio: Tensor

    def __init__(self, scale: NDArray[np.float32], rows: RowGroups) -> None:
        super().__init__()
        reference, ratio = factor_steps(scale)
        self.rows = rows
        self.grouped = scale.ndim == 1
        self.register_buffer("reference", torch.from_numpy(np.array(reference)), persistent=False)
        self.register_buffer("ratio", torch.from_numpy(np.array(ratio)), persistent=False)

    def divide(self, x: Tensor) -> Tensor:
        return x / self.rows.select(self.ratio, x.ndim) if self.grouped else x

    def multiply(self, y: Tensor) -> Tensor:
        return y * self.rows.select(self.ratio, y.ndim) if self.grouped else y


Product = Callable[[Tensor], Tensor]


class SymmetricOperand(nn.Module):
    """Q(x / r) -> product -> * r."""

    def __init__(self, quantizer: Symmetric, rows: RowGroups) -> None:
        super().__init__()
        self.bits = quantizer.bits
        self.step = Step(quantizer.scale, rows)

    def codes_times_reference(self, x: Tensor) -> Tensor:
        return symmetric(self.step.divide(x), self.step.reference, self.bits)

    def forward(self, x: Tensor, product: Product, row_sums: Tensor) -> Tensor:  # noqa: ARG002 (as its siblings)
        return self.step.multiply(product(self.codes_times_reference(x)))


class AsymmetricInput(nn.Module):
    """Q((x - b) / r) -> product -> * r + b rowsum(W^), b = (q - o) s."""

    offset: Tensor

    def __init__(self, quantizer: Asymmetric, rows: RowGroups) -> None:
        super().__init__()
        self.bits = quantizer.bits
        self.rows = rows
        self.step = Step(quantizer.scale, rows)
        self.register_buffer("offset", torch.from_numpy(np.array(quantizer.offset)), persistent=False)

    def forward(self, x: Tensor, product: Product, row_sums: Tensor) -> Tensor:
        b = self.rows.select(self.offset, x.ndim) if self.step.grouped else self.offset
        quantized = symmetric(self.step.divide(x - b), self.step.reference, self.bits)
        return self.step.multiply(product(quantized)) + b * row_sums


class GeluInput(nn.Module):
    """min(x, 0) and max(x, 0), each with its own step; two products with one weight, added."""

    def __init__(self, quantizer: TwoRegionGelu, rows: RowGroups) -> None:
        super().__init__()
        self.bits = quantizer.bits
        self.negative = Step(quantizer.negative_step, rows)
        self.positive = Step(quantizer.positive_step, rows)

    def forward(self, x: Tensor, product: Product, row_sums: Tensor) -> Tensor:  # noqa: ARG002 (as its siblings)
        regions = ((self.negative, x.clamp(max=0)), (self.positive, x.clamp(min=0)))
        low, high = (
            step.multiply(product(symmetric(step.divide(part), step.reference, self.bits))) for step, part in regions
        )
        return low + high


class SoftmaxOperand(nn.Module):
    """Probabilities as the sum of their two regions; the low step of each row's group divides as it is."""

    low_step: Tensor
    high_step: Tensor

    def __init__(self, quantizer: TwoRegionSoftmax, rows: RowGroups) -> None:
        super().__init__()
        self.bits = quantizer.bits
        self.rows = rows
        self.grouped = isinstance(quantizer.granularity, PerTimestepGroup)
        self.register_buffer("low_step", torch.from_numpy(np.array(quantizer.low_step)), persistent=False)
        self.register_buffer("high_step", torch.from_numpy(np.array(quantizer.high_step)), persistent=False)

    def forward(self, p: Tensor) -> Tensor:
        low_step = self.rows.select(self.low_step, p.ndim) if self.grouped else self.low_step
        low, high = softmax_regions(p, low_step, self.high_step, self.bits)
        return low + high


InputQuantizer = SymmetricOperand | AsymmetricInput | GeluInput


class QuantizedLinear(nn.Module):
    """A linear layer or a convolution without padding, with W^ for its weight. The bias comes last."""

    weight: Tensor
    row_sums: Tensor
    bias: Tensor | None

    def __init__(self, module: nn.Linear | nn.Conv2d, weight: Tensor, quantize: InputQuantizer | None) -> None:
        super().__init__()
        self.stride = module.stride if isinstance(module, nn.Conv2d) else None
        shape = (-1,) if self.stride is None else (-1, 1, 1)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("row_sums", weight.flatten(1).sum(1).reshape(shape), persistent=False)
        bias = None if module.bias is None else module.bias.detach().reshape(shape)
        self.register_buffer("bias", bias, persistent=False)
        self.quantize = quantize

    def product(self, x: Tensor) -> Tensor:
        if self.stride is None:
            return F.linear(x, self.weight)
        return F.conv2d(x, self.weight, stride=self.stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x) if self.quantize is None else self.quantize(x, self.product, self.row_sums)
        return y if self.bias is None else y + self.bias


class QuantizedScores(nn.Module):
    """q^ k^T * r_q * r_k / sqrt(d). q and k (N, heads, T, d)."""

    def __init__(self, left: SymmetricOperand, right: SymmetricOperand) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        codes_q, codes_k = self.left.codes_times_reference(q), self.right.codes_times_reference(k)
        product = torch.matmul(codes_q, codes_k.transpose(-2, -1))
        scaled: Tensor = self.right.step.multiply(self.left.step.multiply(product)) * (q.shape[-1] ** -0.5)
        return scaled


class QuantizedValueProduct(nn.Module):
    """P^ v^. Probabilities (N, heads, T, T), v (N, heads, T, d)."""

    def __init__(self, left: SymmetricOperand | SoftmaxOperand, right: SymmetricOperand) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, probabilities: Tensor, v: Tensor) -> Tensor:
        v = self.right.codes_times_reference(v)
        if isinstance(self.left, SoftmaxOperand):
            return self.right.step.multiply(torch.matmul(self.left(probabilities), v))
        product = self.left.step.multiply(torch.matmul(self.left.codes_times_reference(probabilities), v))
        scaled: Tensor = self.right.step.multiply(product)
        return scaled


def find_module(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError as error:
        raise UsageError(f"the scale table names '{name}', which the network lacks. Calibrate again.") from error


def quantize_module(name: str, module: nn.Module, sites: Mapping[str, Site], rows: RowGroups) -> nn.Module:
    """The quantized form of one module of the network."""
    products: dict[type[nn.Module], Any] = {Scores: QuantizedScores, ValueProduct: QuantizedValueProduct}
    expected = {"left", "right"} if type(module) in products else {"weight", "input"}
    if not isinstance(module, nn.Linear | nn.Conv2d | Scores | ValueProduct) or not set(sites) <= expected:
        raise UsageError(f"the scale table quantizes {sorted(sites)} of '{name}', a {type(module).__name__}. "
                         "Calibrate again.")  # fmt: skip
    if isinstance(module, nn.Linear | nn.Conv2d):
        weight = module.weight.detach()
        if "weight" in sites:
            weight = dequantized_weight(weight, sites["weight"])
        operand = _operand(sites["input"].quantizer, rows) if "input" in sites else None
        if isinstance(module, nn.Conv2d) and any(module.padding):
            raise UsageError(f"'{name}' is a convolution with padding, which cannot be quantized. Leave it out.")
        return QuantizedLinear(module, weight, operand)
    if set(sites) != expected:
        raise UsageError(f"the scale table quantizes only {sorted(sites)} of the product '{name}'. Calibrate again.")
    built: nn.Module = products[type(module)](*(_operand(sites[role].quantizer, rows) for role in ("left", "right")))
    return built


def _operand(quantizer: Quantizer, rows: RowGroups) -> Any:
    match quantizer:
        case Symmetric():
            return SymmetricOperand(quantizer, rows)
        case Asymmetric():
            return AsymmetricInput(quantizer, rows)
        case TwoRegionGelu():
            return GeluInput(quantizer, rows)
        case TwoRegionSoftmax():
            return SoftmaxOperand(quantizer, rows)


def weight_codes(weight: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """(codes, scale) of a weight, float32: its stored codes, or those of rounding to nearest. scale broadcasts."""
    quantizer = site.quantizer
    assert isinstance(quantizer, Symmetric)
    scale = torch.from_numpy(np.array(quantizer.scale)).to(weight.device)
    if isinstance(quantizer.granularity, PerChannel):
        axis = quantizer.granularity.axis
        if axis >= weight.ndim or weight.shape[axis] != len(scale):
            raise UsageError(
                f"'{site.name}' has {len(scale)} scales, the weight of shape {tuple(weight.shape)} needs one per index "
                f"of axis {axis}. Calibrate this model."
            )
        scale = scale.reshape([-1 if dim == axis else 1 for dim in range(weight.ndim)])
    if site.codes is None:
        return symmetric_codes(weight, scale, quantizer.bits), scale
    if site.codes.shape != tuple(weight.shape):
        raise UsageError(f"'{site.name}.codes' has shape {site.codes.shape}, the weight {tuple(weight.shape)}. "
                         "Calibrate this model.")  # fmt: skip
    return torch.from_numpy(site.codes.astype(np.float32)).to(weight.device), scale


def dequantized_weight(weight: Tensor, site: Site) -> Tensor:
    """W^ = codes * scale."""
    codes, scale = weight_codes(weight, site)
    return codes * scale
