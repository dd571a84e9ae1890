"""`dynamic_asymmetric`: a range for each token, found while the network runs: s = (max x - min x) / (2^k - 1).

With b = min x + q s, x^ = s c + b, c = round((x - b) / s) in -q..q-1: both ends of the range are exact, and so is a
token of one value. A product takes the integers c; s multiplies its result, and b times the row sums of W^ is added.
Values on one side of 0, such as those after GELU, have twice the codes that `dynamic` gives them.

Tokens that are not ordinary are as in `dynamic`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tqdit.quantization import rounding
from tqdit.quantization.quantizer import Arithmetic, Float32, Parameters, Part, V
from tqdit.quantization.schemes.dynamic import Dynamic

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class DynamicAsymmetric(Dynamic):
    """Asymmetric, per token; without tensors."""

    scheme = "dynamic_asymmetric"

    @classmethod
    def fake_quantize(cls, x: Tensor, bits: int, tensors: Parameters) -> Tensor:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = ((high - low) / ((1 << bits) - 1)).clamp(min=rounding.SMALLEST_SCALE)
        offset = low + scale * (1 << (bits - 1))
        return rounding.rounded(x - offset, scale, bits) + offset

    def constants(self) -> dict[str, Float32]:
        """`scale` is that of (x - b) / s, whose integers a product takes."""
        q = 1 << (self.bits - 1)
        numbers = {"scale": 1.0, "half": q, "top": 2 * q - 1, "smallest": rounding.SMALLEST_SCALE}
        return {name: np.asarray(number, np.float32) for name, number in numbers.items()}

    def parts(self, ops: Arithmetic[V], x: V) -> Iterator[Part[V]]:
        low = ops.smallest(x)
        width = ops.divide(ops.subtract(ops.largest(x), low), ops.constant("top", x))
        scale = ops.maximum(width, ops.constant("smallest", x))
        offset = ops.add(low, ops.multiply(scale, ops.constant("half", x)))
        part = ops.rounded(ops.divide(ops.subtract(x, offset), scale), "scale")
        yield Part(part.values, scale, offset, part.unit)

    torch_parts = graph_parts = parts
