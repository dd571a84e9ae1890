"""`softmax_numerator`: two regions of the numerators e = exp(score - largest score of the row), for long sequences.

P^ = e^ / sum(e), with e^ in two regions as `softmax` has them, and the sum of the float numerators. The largest e of a
row is 1 whatever the number of keys, and the division follows the product with V. Probabilities of N keys are about
1 / N, and no scale of `softmax` is below 2^-(k-1) / (q - 1).

A product is given probabilities: e = p / max(p), and 1 / sum(e) = max(p).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdit.quantization.quantizer import Arithmetic, GraphArithmetic, Parameters, Part, RegionOps, V
from tqdit.quantization.schemes.two_region_softmax import TwoRegionSoftmax

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class SoftmaxNumerator(TwoRegionSoftmax):
    """The scales are those of e: `low_scale` s1, at most `high_scale` s2."""

    scheme = "softmax_numerator"
    softmax = RegionOps(
        "MultiRegionNumerator", "MultiRegionNumeratorAttention", "MultiRegionNumeratorIntegerAttention", outputs=2
    )

    @classmethod
    def fake_quantize(cls, x: Tensor, bits: int, tensors: Parameters) -> Tensor:
        """x probabilities (..., N keys) -> P^. What a mask hides is exactly 0, before and after."""
        largest = x.amax(-1, keepdim=True)
        return super().fake_quantize(x / largest, bits, tensors) * largest

    def torch_parts(self, ops: Arithmetic[Tensor], x: Tensor) -> Iterator[Part[Tensor]]:
        largest = x.amax(-1, keepdim=True)
        for part in super().torch_parts(ops, x / largest):
            yield Part(part.values, largest)

    def graph_parts(self, ops: GraphArithmetic[V], x: V) -> Iterator[Part[V]]:
        """Each part is multiplied by 1 / sum(e) behind its product."""
        numerators, reciprocal = ops.softmax_in_regions(x, self.softmax)
        for part in self.split(ops, numerators):
            yield Part(part.values, reciprocal if part.ratio is None else ops.op("Mul", part.ratio, reciprocal))
