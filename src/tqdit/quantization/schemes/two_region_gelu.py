"""`gelu`: negative and positive values with a scale each (the multi-region quantizer after GELU, TQ-DiT III-C).

x < 0: s- clip(round(x / s-), -q, 0); x >= 0: s+ clip(round(x / s+), 0, q - 1). Both lie on the symmetric grid:
min(x, 0) takes only its codes -q..0, max(x, 0) only 0..q-1. A layer with such an input has two products with the same
weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tqdit.quantization import rounding
from tqdit.quantization.quantizer import Arithmetic, Float32, Parameters, Part, Quantizer, V

if TYPE_CHECKING:
    from torch import Tensor

GELU_MINIMUM = -0.170041  # of tanh-GELU, which DiT uses: where the search for the negative scale starts in every layer


@dataclass(frozen=True, eq=False)
class TwoRegionGelu(Quantizer):
    """`negative_scale` s- and `positive_scale` s+, float32 of the granularity's shape."""

    scheme = "gelu"
    roles = ("input",)
    tensors: ClassVar = {"negative_scale": "float32", "positive_scale": "float32"}
    plotted = "positive_scale"

    negative_scale: Float32
    positive_scale: Float32

    @classmethod
    def initial(cls, low: Tensor, high: Tensor, bits: int, fixed: Mapping[str, float]) -> Parameters:
        """The negative scale reaches to GELU's minimum, or further if the channels are equalised."""
        return {
            "positive_scale": rounding.range_scale(high.clamp(min=0), bits),
            "negative_scale": -low.clamp(max=GELU_MINIMUM) / (1 << (bits - 1)),
        }

    @classmethod
    def fake_quantize(cls, x: Tensor, bits: int, tensors: Parameters) -> Tensor:
        negative = rounding.rounded(x.clamp(max=0), tensors["negative_scale"], bits)
        return negative + rounding.rounded(x.clamp(min=0), tensors["positive_scale"], bits)

    def parts(self, ops: Arithmetic[V], x: V) -> Iterator[Part[V]]:
        yield ops.rounded(ops.negative(x), "negative_scale")
        yield ops.rounded(ops.positive(x), "positive_scale")

    torch_parts = graph_parts = parts
