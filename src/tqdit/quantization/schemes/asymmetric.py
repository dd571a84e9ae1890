"""`asymmetric`: x^ = s (clip(round(x / s) + o, 0, 2^k - 1) - o), eq. 5 of TQ-DiT as it must be meant.

With b = (q - o) s the same values lie on the symmetric grid, x^ = Q(x - b; s) + b, which engines multiply as int8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from tqdit.quantization import rounding
from tqdit.quantization.quantizer import Arithmetic, Float32, Parameters, Part, Quantizer, V

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Asymmetric(Quantizer):
    """`scale` s, float32, and `zero_point` o, int32, both of the granularity's shape."""

    scheme = "asymmetric"
    roles = ("input",)
    tensors: ClassVar = {"scale": "float32", "zero_point": "int32"}

    scale: Float32
    zero_point: NDArray[np.int32]

    @property
    def offset(self) -> Float32:
        """b = (q - o) s. Like `scale`."""
        return np.asarray((2 ** (self.bits - 1) - self.zero_point).astype(np.float32) * self.scale)

    def problem(self, site: str) -> str | None:
        top = 2**self.bits - 1
        if self.zero_point.min() < 0 or self.zero_point.max() > top:
            return f"'{site}.zero_point' holds values outside 0..{top}"
        return None

    @classmethod
    def initial(cls, low: Tensor, high: Tensor, bits: int, fixed: Mapping[str, float]) -> Parameters:
        """The two ends of the range, which are searched one after the other; 0 stays between them, and exact."""
        return {"high": high.clamp(min=0), "low": low.clamp(max=0)}

    @classmethod
    def resolve(cls, parameters: Parameters, bits: int) -> Parameters:
        low, high, top = parameters["low"].clamp(max=0), parameters["high"].clamp(min=0), (1 << bits) - 1
        scale = rounding.usable((high - low) / top)
        return {"scale": scale, "zero_point": (-low / scale).round().clamp(0, top)}

    @classmethod
    def fake_quantize(cls, x: Tensor, bits: int, tensors: Parameters) -> Tensor:
        scale, zero_point = tensors["scale"], tensors["zero_point"]
        codes = (x / scale).round_().add_(zero_point).clamp_(0, (1 << bits) - 1)
        return codes.sub_(zero_point).mul_(scale)

    def constants(self) -> dict[str, Float32]:
        return {"scale": self.scale, "offset": self.offset}

    def parts(self, ops: Arithmetic[V], x: V) -> Iterator[Part[V]]:
        offset = ops.constant("offset", x)
        part = ops.rounded(ops.subtract(x, offset), "scale")
        yield Part(part.values, part.ratio, offset, part.unit)

    torch_parts = graph_parts = parts
