"""`asymmetric_bits`: `asymmetric` with bits of its own for each group of timesteps, in the form of `symmetric_bits`.

x^ = s[g] (clip(round(x / s[g]) + o[g], 0, 2^k[g] - 1) - o[g]); with b = (q[g] - o[g]) s[g] the same values lie on the
symmetric grid, to whose ends x - b is clipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from tqdit.quantization import rounding
from tqdit.quantization.quantizer import Arithmetic, Fixed, Float32, Parameters, Part, V
from tqdit.quantization.schemes.asymmetric import Asymmetric
from tqdit.quantization.schemes.symmetric_bits import MOST_BITS, bits_problem, clipped, ends, parse

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class AsymmetricBits(Asymmetric):
    """`scale` s, float32, `zero_point` o and `group_bits` k, int32, of the granularity's shape. `bits` is nominal."""

    scheme = "asymmetric_bits"
    tensors: ClassVar = {"scale": "float32", "zero_point": "int32", "group_bits": "int32"}

    group_bits: NDArray[np.int32]

    @property
    def code_bits(self) -> int:
        return MOST_BITS

    @property
    def offset(self) -> Float32:
        return np.asarray((2 ** (self.group_bits - 1) - self.zero_point).astype(np.float32) * self.scale)

    def problem(self, site: str) -> str | None:
        top = 2**self.group_bits - 1
        if (self.zero_point < 0).any() or (self.zero_point > top).any():
            return f"'{site}.zero_point' holds values outside 0..2^bits - 1 of their groups"
        return bits_problem(site, self.group_bits)

    @classmethod
    def fixed(cls, bits: int, **options: str) -> Fixed:
        return {"group_bits": parse(options.get("group_bits", str(bits)))}

    @classmethod
    def resolve(cls, parameters: Parameters, bits: int) -> Parameters:
        low, high = parameters["low"].clamp(max=0), parameters["high"].clamp(min=0)
        top = 2.0 ** parameters["group_bits"].to(low.device) - 1
        scale = rounding.usable((high - low) / top)
        zero_point = (-low / scale).round().clamp(min=0).minimum(top)
        return {"scale": scale, "zero_point": zero_point, "group_bits": parameters["group_bits"]}

    @classmethod
    def fake_quantize(cls, x: Tensor, bits: int, tensors: Parameters) -> Tensor:
        scale, zero_point, top = tensors["scale"], tensors["zero_point"], 2.0 ** tensors["group_bits"] - 1
        codes = (x / scale).round_().add_(zero_point).clamp_(min=0).minimum(top)
        return codes.sub_(zero_point).mul_(scale)

    def constants(self) -> dict[str, Float32]:
        """`low` and `high`: the ends of each group's range of x - b."""
        return super().constants() | ends(self.scale, self.group_bits)

    def parts(self, ops: Arithmetic[V], x: V) -> Iterator[Part[V]]:
        offset = ops.constant("offset", x)
        part = ops.rounded(clipped(ops, ops.subtract(x, offset)), "scale")
        yield Part(part.values, part.ratio, offset, part.unit)

    torch_parts = graph_parts = parts
