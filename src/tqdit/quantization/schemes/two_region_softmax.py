"""`softmax`: small probabilities with a fine scale, large ones with a coarse one (TQ-DiT III-C).

c = round(p / s1); x^ = s1 c if c <= q - 1, otherwise s2 clip(round(p / s2), 0, q - 1). Codes are 0..q-1 in both
regions, and a value lies in exactly one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from tqdit.quantization.quantizer import (
    Arithmetic,
    Float32,
    GraphArithmetic,
    Parameters,
    Part,
    Quantizer,
    RegionOps,
    Shape,
    V,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class TwoRegionSoftmax(Quantizer):
    """`low_scale` s1, float32 of the granularity's shape, at most `high_scale` s2, float32 ()."""

    scheme = "softmax"
    roles = ("left",)
    tensors: ClassVar = {"low_scale": "float32", "high_scale": "float32"}
    plotted = "low_scale"
    softmax = RegionOps("MultiRegionSoftmax", "MultiRegionAttention", "MultiRegionIntegerAttention")

    low_scale: Float32
    high_scale: Float32

    def shape(self, name: str, scales: Shape) -> Shape:
        return () if name == "high_scale" else scales

    def problem(self, site: str) -> str | None:
        return f"'{site}.low_scale' is above its high scale" if np.any(self.low_scale > self.high_scale) else None

    @classmethod
    def fixed(cls, bits: int, top: str = "exact", **options: str) -> dict[str, float]:
        """s2 = 1 / (q - 1), which represents 1 exactly, or with `top` "paper" 1 / q, which clips its top code."""
        q = 1 << (bits - 1)
        return {"high_scale": 1 / (q - 1) if top == "exact" else 1 / q}

    @classmethod
    def initial(cls, low: Tensor, high: Tensor, bits: int, fixed: Mapping[str, float]) -> Parameters:
        return {"low_scale": low.new_full((len(low),), fixed["high_scale"] * 2.0 ** -min(3, bits - 1))}

    @classmethod
    def candidates(cls, name: str, initial: Tensor, factors: Tensor, bits: int, fixed: Mapping[str, float]) -> Tensor:
        """s1 = 2^-i s2, i = k-1..0. Beyond k - 1 larger probabilities could get smaller values."""
        scales = factors.new_tensor([fixed["high_scale"] * 2.0**-i for i in reversed(range(bits))])
        return scales[:, None].expand(-1, len(initial))

    @classmethod
    def regions(cls, p: Tensor, bits: int, low_scale: Tensor, high_scale: Tensor) -> tuple[Tensor, Tensor]:
        """The values of both regions, each 0 in the other one; their sum is x^."""
        top, zero = (1 << (bits - 1)) - 1, p.new_zeros(())
        codes = (p / low_scale).round()
        is_low = codes <= top
        high = (p / high_scale).round().clamp(0, top) * high_scale
        return (codes * low_scale).where(is_low, zero), zero.where(is_low, high)

    @classmethod
    def fake_quantize(cls, x: Tensor, bits: int, tensors: Parameters) -> Tensor:
        low, high = cls.regions(x, bits, tensors["low_scale"], tensors["high_scale"])
        return low + high

    def constants(self) -> dict[str, Float32]:
        """`boundary` (q - 1/2) s1 lies between the largest low value, (q - 1) s1, and the high ones, at least q s1."""
        half = np.float32((1 << (self.bits - 1)) - 0.5)
        boundary = (self.low_scale * half).astype(np.float32)
        return {**super().constants(), "boundary": boundary, "zero": np.zeros((), np.float32)}

    def torch_parts(self, ops: Arithmetic[Tensor], x: Tensor) -> Iterator[Part[Tensor]]:
        low, high = self.regions(x, self.bits, ops.constant("low_scale", x), ops.constant("high_scale", x))
        yield Part(low + high)

    def graph_parts(self, ops: GraphArithmetic[V], x: V) -> Iterator[Part[V]]:
        """MultiRegionSoftmax rounds; for integer products its regions are split again, with one product each."""
        (p,) = ops.softmax_in_regions(x, self.softmax)
        yield from self.split(ops, p)

    def split(self, ops: GraphArithmetic[V], p: V) -> Iterator[Part[V]]:
        """The parts of values `p` that are rounded already."""
        if ops.rounding != "integer":
            yield Part(p)
            return
        boundary, zero = ops.constant("boundary", p), ops.constant("zero", p)
        is_low = ops.op("LessOrEqual", p, boundary)
        low = ops.rounded(ops.op("Where", is_low, p, zero), "low_scale")
        high = ops.rounded(ops.op("Where", is_low, zero, p), "high_scale")
        yield low
        yield high
