"""The tensors under search: what their schemes know of parameters and candidates, and which errors each entry causes.

A parameter is a tensor (E,) of E independent entries: one for the tensor, one per group of timesteps, or one per output
channel. Entries are independent because no element of the product's error depends on two of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqdit.calibration.layers import OperandPlan
from tqdit.quantization.granularity import Granularity, PerChannel, PerTensor, PerTimestepGroup, PerToken
from tqdit.quantization.quantizer import Fixed, Parameters, Quantizer
from tqdit.quantization.schemes import find_schemes


@dataclass(frozen=True, eq=False)
class Operand(ABC):
    """One tensor `x` with its plan; `factors` (n,) are the candidates around the range-based parameters."""

    x: Tensor
    plan: OperandPlan
    factors: Tensor

    @property
    @abstractmethod
    def extremes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each entry's elements, (E,)."""

    @property
    @abstractmethod
    def granularity(self) -> Granularity: ...

    @abstractmethod
    def spread(self, values: Tensor) -> Tensor:
        """(E,) to a shape that broadcasts against x."""

    @abstractmethod
    def stored(self, values: Tensor) -> Tensor:
        """(E,) to the shape of the granularity."""

    @abstractmethod
    def entries(self, error: Tensor) -> Tensor:
        """Sum an elementwise error of the product, (R, ..., O), over the elements that each entry causes: (E,)."""

    @cached_property
    def scheme(self) -> type[Quantizer]:
        return find_schemes()[self.plan.scheme]

    @cached_property
    def fixed(self) -> Fixed:
        return self.scheme.fixed(self.plan.bits, **self.plan.options)

    @cached_property
    def initial(self) -> Parameters:
        """Range-based parameters, in the order in which a search visits them."""
        return self.scheme.initial(*self.extremes, self.plan.bits, self.fixed)

    def grid(self, name: str) -> Tensor:
        """Candidates of one parameter, (n, E), in increasing order of their range."""
        return self.scheme.candidates(name, self.initial[name], self.factors, self.plan.bits, self.fixed)

    def _tensors(self, parameters: Parameters) -> Parameters:
        """What the scale table holds, each (E,), or () if no search changes it."""
        fixed = {name: self.x.new_tensor(value, dtype=torch.float32) for name, value in self.fixed.items()}
        return self.scheme.resolve({**parameters, **fixed}, self.plan.bits)

    def quantize(self, parameters: Parameters) -> Tensor:
        """x^, of x's shape."""
        tensors = {name: self.spread(t) if t.ndim else t for name, t in self._tensors(parameters).items()}
        return self.scheme.fake_quantize(self.x, self.plan.bits, tensors)

    def quantizer(self, parameters: Parameters) -> Quantizer:
        """The parameters as an entry of the scale table."""
        tensors = {name: self.stored(t) if t.ndim else t for name, t in self._tensors(parameters).items()}
        arrays: dict[str, NDArray[Any]] = {
            name: array(tensors[name]).astype(dtype) for name, dtype in self.scheme.tensors.items()
        }
        return self.scheme(self.plan.bits, self.granularity, **arrays)


@dataclass(frozen=True, eq=False)
class Weight(Operand):
    """W (O, K). Its E entries are blocks of O / E output channels."""

    @cached_property
    def extremes(self) -> tuple[Tensor, Tensor]:
        blocks = self.x.reshape(self.plan.scales, -1)
        return blocks.amin(1), blocks.amax(1)

    @property
    def granularity(self) -> Granularity:
        return PerTensor() if self.plan.scales == 1 else PerChannel(0)

    def per_channel(self, scale: Tensor) -> Tensor:
        """(E,) to one scale per output channel, (O,)."""
        return scale.repeat_interleave(len(self.x) // len(scale))

    def spread(self, values: Tensor) -> Tensor:
        return self.per_channel(values)[:, None]

    def stored(self, values: Tensor) -> Tensor:
        return values[0] if self.plan.scales == 1 else self.per_channel(values)

    def entries(self, error: Tensor) -> Tensor:
        return error.flatten(0, -2).sum(0).reshape(self.plan.scales, -1).sum(1)


@dataclass(frozen=True, eq=False)
class Activation(Operand):
    """x (R', ..., K), one row per calibration row, or those of `rows` (R',) alone. low, high (R,): the range of each
    calibration row; group (R,) int64."""

    group: Tensor
    low: Tensor
    high: Tensor
    rows: Tensor | None = None

    @cached_property
    def own_group(self) -> Tensor:
        """Of each row of x, (R',)."""
        return self.group if self.rows is None else self.group[self.rows]

    @property
    def grouped(self) -> bool:
        return self.plan.scales > 1

    @cached_property
    def extremes(self) -> tuple[Tensor, Tensor]:
        if not self.grouped:
            return self.low.amin()[None], self.high.amax()[None]
        lowest = self._zeros().scatter_reduce(0, self.group, self.low, "amin", include_self=False)
        return lowest, self._zeros().scatter_reduce(0, self.group, self.high, "amax", include_self=False)

    @property
    def granularity(self) -> Granularity:
        if not self.scheme.tensors:
            return PerToken()
        return PerTimestepGroup(self.plan.scales) if self.grouped else PerTensor()

    def spread(self, values: Tensor) -> Tensor:
        return values[self.own_group].reshape(-1, *[1] * (self.x.ndim - 1)) if self.grouped else values[0]

    def stored(self, values: Tensor) -> Tensor:
        return values if self.grouped else values[0]

    def entries(self, error: Tensor) -> Tensor:
        rows = error.flatten(1).sum(1)
        return self._zeros().index_add(0, self.own_group, rows) if self.grouped else rows.sum()[None]

    def _zeros(self) -> Tensor:
        return torch.zeros(self.plan.scales, device=self.x.device)


def array(tensor: Tensor) -> NDArray[np.float32]:
    return np.array(tensor.detach().cpu().float().numpy(), dtype=np.float32)
