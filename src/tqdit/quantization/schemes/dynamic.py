"""`dynamic`: a scale for each token, found while the network runs: s = max |x| / (2^(k-1) - 1) over its channels.

x^ = s c, c = round(x / s), so the largest value of a token is exact and nothing is clipped. A product is linear in its
tokens: it takes the integers c, and s multiplies its result. Nothing is calibrated and nothing is stored.

A token of zeros, and one whose scale would be no normal float32 number, gets the smallest normal scale: its values
become 0. NaN or an infinite value make the scale of their own token NaN or infinite, and of no other token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from tqdit.quantization import rounding
from tqdit.quantization.quantizer import Arithmetic, Float32, Parameters, Part, Quantizer, V

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Dynamic(Quantizer):
    """Symmetric, per token; without tensors."""

    scheme = "dynamic"
    roles = ("input",)
    tensors: ClassVar = {}

    @property
    def code_bits(self) -> int:
        """The codes of x / s fit k bits as they are."""
        return 8

    @classmethod
    def initial(cls, low: Tensor, high: Tensor, bits: int, fixed: Mapping[str, float]) -> Parameters:
        return {}

    @classmethod
    def fake_quantize(cls, x: Tensor, bits: int, tensors: Parameters) -> Tensor:
        _, top = rounding.code_range(bits)
        scale = (x.abs().amax(-1, keepdim=True) / top).clamp(min=rounding.SMALLEST_SCALE)
        return rounding.rounded(x, scale, bits)

    def constants(self) -> dict[str, Float32]:
        """`scale` is that of x / s, whose integers a product takes."""
        _, top = rounding.code_range(self.bits)
        numbers = {"scale": 1.0, "top": top, "smallest": rounding.SMALLEST_SCALE}
        return {name: np.asarray(number, np.float32) for name, number in numbers.items()}

    def parts(self, ops: Arithmetic[V], x: V) -> Iterator[Part[V]]:
        width = ops.divide(ops.largest(ops.absolute(x)), ops.constant("top", x))
        scale = ops.maximum(width, ops.constant("smallest", x))
        part = ops.rounded(ops.divide(x, scale), "scale")
        yield Part(part.values, scale, unit=part.unit)

    torch_parts = graph_parts = parts
