"""`symmetric`: x^ = s c, c = clip(round(x / s), -q, q - 1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tqdit.quantization import rounding
from tqdit.quantization.granularity import ROLES
from tqdit.quantization.quantizer import Arithmetic, Float32, Parameters, Part, Quantizer, V

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Symmetric(Quantizer):
    """`scale` s, float32 of the granularity's shape."""

    scheme = "symmetric"
    roles = ROLES
    tensors: ClassVar = {"scale": "float32"}

    scale: Float32

    @classmethod
    def initial(cls, low: Tensor, high: Tensor, bits: int, fixed: Mapping[str, float]) -> Parameters:
        return {"scale": rounding.range_scale(low.abs().maximum(high.abs()), bits)}

    @classmethod
    def fake_quantize(cls, x: Tensor, bits: int, tensors: Parameters) -> Tensor:
        return rounding.rounded(x, tensors["scale"], bits)

    def parts(self, ops: Arithmetic[V], x: V) -> Iterator[Part[V]]:
        yield ops.rounded(x, "scale")

    torch_parts = graph_parts = parts
