"""A toy scheme in one file: symmetric, with scales that are powers of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tqdit.quantization.quantizer import Parameters
from tqdit.quantization.schemes.symmetric import Symmetric


@dataclass(frozen=True, eq=False)
class PowerOfTwo(Symmetric):
    scheme = "power-of-two"
    roles = ("input",)

    def problem(self, site: str) -> str | None:
        mantissa, _ = np.frexp(self.scale)
        return f"'{site}.scale' holds values that are no powers of two" if np.any(mantissa != 0.5) else None

    @classmethod
    def initial(cls, low: Tensor, high: Tensor, bits: int, fixed: Mapping[str, float]) -> Parameters:
        """The power of two at or above the range-based scale."""
        scale = super().initial(low, high, bits, fixed)["scale"]
        return {"scale": scale.log2().ceil().exp2()}

    @classmethod
    def candidates(cls, name: str, initial: Tensor, factors: Tensor, bits: int, fixed: Mapping[str, float]) -> Tensor:
        return initial * factors.new_tensor([2.0**-i for i in reversed(range(bits))])[:, None]
