"""The tensors under search: each knows its quantizer's parameters, their candidates, and which errors each one causes.

A parameter is a tensor (E,) of E independent entries: one for the tensor, one per group of timesteps, or one per output
channel. Entries are independent because no element of the product's error depends on two of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqdit.calibrate.layers import OperandPlan
from tqdit.quantization import quantizers
from tqdit.quantization.table import (
    Asymmetric,
    Granularity,
    PerChannel,
    PerTensor,
    PerTimestepGroup,
    Quantizer,
    Symmetric,
    TwoRegionGelu,
    TwoRegionSoftmax,
)

Parameters = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Operand(ABC):
    """One tensor `x` with its plan; `factors` (n,) are the candidates around the range-based parameters."""

    x: Tensor
    plan: OperandPlan
    factors: Tensor

    @property
    @abstractmethod
    def initial(self) -> Parameters:
        """Range-based parameters, in the order in which a search visits them."""

    @abstractmethod
    def quantize(self, parameters: Parameters) -> Tensor:
        """x^, of x's shape."""

    @abstractmethod
    def entries(self, error: Tensor) -> Tensor:
        """Sum an elementwise error of the product, (R, ..., O), over the elements that each entry causes: (E,)."""

    @abstractmethod
    def quantizer(self, parameters: Parameters) -> Quantizer:
        """The parameters as an entry of the scale table."""

    def grid(self, name: str) -> Tensor:
        """Candidates of one parameter, (n, E), in increasing order of their range."""
        return self.factors[:, None] * self.initial[name][None]


@dataclass(frozen=True, eq=False)
class Weight(Operand):
    """W (O, K). Its E entries are blocks of O / E output channels."""

    @cached_property
    def initial(self) -> Parameters:
        largest = self.x.abs().reshape(self.plan.steps, -1).amax(1)
        return {"scale": quantizers.symmetric_step(largest, self.plan.bits)}

    def per_channel(self, scale: Tensor) -> Tensor:
        """(E,) to one step per output channel, (O,)."""
        return scale.repeat_interleave(len(self.x) // len(scale))

    def quantize(self, parameters: Parameters) -> Tensor:
        return quantizers.symmetric(self.x, self.per_channel(parameters["scale"])[:, None], self.plan.bits)

    def entries(self, error: Tensor) -> Tensor:
        return error.flatten(0, -2).sum(0).reshape(self.plan.steps, -1).sum(1)

    def quantizer(self, parameters: Parameters) -> Quantizer:
        scale = parameters["scale"]
        if len(scale) == 1:
            return Symmetric(self.plan.bits, PerTensor(), array(scale[0]))
        return Symmetric(self.plan.bits, PerChannel(0), array(self.per_channel(scale)))


@dataclass(frozen=True, eq=False)
class Activation(Operand):
    """x (R, ..., K), one row per calibration row. low, high (R,): the range of each row; group (R,) int64."""

    group: Tensor
    low: Tensor
    high: Tensor

    @property
    def grouped(self) -> bool:
        return self.plan.steps > 1

    def spread(self, values: Tensor) -> Tensor:
        """(E,) to one value per row, shaped to broadcast against x."""
        return values[self.group].reshape(-1, *[1] * (self.x.ndim - 1)) if self.grouped else values[0]

    def entries(self, error: Tensor) -> Tensor:
        rows = error.flatten(1).sum(1)
        return self._zeros().index_add(0, self.group, rows) if self.grouped else rows.sum()[None]

    def _zeros(self) -> Tensor:
        return torch.zeros(self.plan.steps, device=self.x.device)

    @cached_property
    def extremes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each entry's rows, (E,)."""
        if not self.grouped:
            return self.low.amin()[None], self.high.amax()[None]
        lowest = self._zeros().scatter_reduce(0, self.group, self.low, "amin", include_self=False)
        return lowest, self._zeros().scatter_reduce(0, self.group, self.high, "amax", include_self=False)

    @property
    def granularity(self) -> Granularity:
        return PerTimestepGroup(self.plan.steps) if self.grouped else PerTensor()

    def arrays(self, *tensors: Tensor) -> list[NDArray[np.float32]]:
        return [array(tensor if self.grouped else tensor[0]) for tensor in tensors]


@dataclass(frozen=True, eq=False)
class SymmetricActivation(Activation):
    @cached_property
    def initial(self) -> Parameters:
        low, high = self.extremes
        return {"scale": quantizers.symmetric_step(torch.maximum(low.abs(), high.abs()), self.plan.bits)}

    def quantize(self, parameters: Parameters) -> Tensor:
        return quantizers.symmetric(self.x, self.spread(parameters["scale"]), self.plan.bits)

    def quantizer(self, parameters: Parameters) -> Quantizer:
        return Symmetric(self.plan.bits, self.granularity, *self.arrays(parameters["scale"]))


@dataclass(frozen=True, eq=False)
class AsymmetricActivation(Activation):
    """Searched by its two ends, one after the other; step and zero point follow from them."""

    @cached_property
    def initial(self) -> Parameters:
        low, high = self.extremes
        return {"high": high.clamp(min=0), "low": low.clamp(max=0)}

    def _step(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        return quantizers.asymmetric_parameters(parameters["low"], parameters["high"], self.plan.bits)

    def quantize(self, parameters: Parameters) -> Tensor:
        step, zero_point = self._step(parameters)
        return quantizers.asymmetric(self.x, self.spread(step), self.spread(zero_point), self.plan.bits)

    def quantizer(self, parameters: Parameters) -> Quantizer:
        scale, zero_point = self.arrays(*self._step(parameters))
        return Asymmetric(self.plan.bits, self.granularity, scale, zero_point.astype(np.int32))


@dataclass(frozen=True, eq=False)
class GeluActivation(Activation):
    """Two steps, searched one after the other. The negative one starts from the minimum of tanh-GELU in every layer
    (equalised channels may reach further)."""

    @cached_property
    def initial(self) -> Parameters:
        low, high = self.extremes
        negative = -low.clamp(max=quantizers.GELU_MINIMUM) / quantizers.half_range(self.plan.bits)
        return {"positive": quantizers.symmetric_step(high.clamp(min=0), self.plan.bits), "negative": negative}

    def quantize(self, parameters: Parameters) -> Tensor:
        negative, positive = quantizers.gelu_regions(
            self.x, self.spread(parameters["negative"]), self.spread(parameters["positive"]), self.plan.bits
        )
        return negative + positive

    def quantizer(self, parameters: Parameters) -> Quantizer:
        steps = self.arrays(parameters["negative"], parameters["positive"])
        return TwoRegionGelu(self.plan.bits, self.granularity, *steps)


@dataclass(frozen=True, eq=False)
class SoftmaxActivation(Activation):
    """The low step is searched among the high step times 2^-i, i = 0..k-1; the high step is fixed."""

    high_step: float

    @cached_property
    def initial(self) -> Parameters:
        steps = quantizers.softmax_low_steps(self.plan.bits, self.high_step).to(self.x.device)
        return {"low_step": steps[min(3, self.plan.bits - 1)].repeat(self.plan.steps)}

    def grid(self, name: str) -> Tensor:  # noqa: ARG002 (there is but one parameter)
        steps = quantizers.softmax_low_steps(self.plan.bits, self.high_step).flip(0).to(self.x.device)
        return steps[:, None].expand(-1, self.plan.steps)

    def quantize(self, parameters: Parameters) -> Tensor:
        high_step = torch.tensor(self.high_step)
        low, high = quantizers.softmax_regions(self.x, self.spread(parameters["low_step"]), high_step, self.plan.bits)
        return low + high

    def quantizer(self, parameters: Parameters) -> Quantizer:
        (low_step,) = self.arrays(parameters["low_step"])
        return TwoRegionSoftmax(self.plan.bits, self.granularity, low_step, np.array(self.high_step, dtype=np.float32))


def array(tensor: Tensor) -> NDArray[np.float32]:
    return np.array(tensor.detach().cpu().numpy(), dtype=np.float32)
