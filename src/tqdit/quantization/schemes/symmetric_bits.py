"""`symmetric_bits`: `symmetric` with bits of its own for each group of timesteps (AdaTSQ, arXiv 2602.09883).

x^ = s[g] c, c = clip(round(x / s[g]), -q[g], q[g] - 1), q[g] = 2^(k[g] - 1). The codes of every group lie in int8: x is
clipped to -q[g] s[g] .. (q[g] - 1) s[g] before it is rounded on the grid of 8 bits, and both ends are codes. So the
product is that of `symmetric`, with a constant scale for its integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tqdit.quantization import rounding
from tqdit.quantization.quantizer import Arithmetic, Fixed, Float32, Parameters, Part, V
from tqdit.quantization.schemes.symmetric import Symmetric

if TYPE_CHECKING:
    from torch import Tensor

MOST_BITS = 8


@dataclass(frozen=True, eq=False)
class SymmetricBits(Symmetric):
    """`scale` s, float32, and `group_bits` k, int32, both of the granularity's shape. `bits` is nominal."""

    scheme = "symmetric_bits"
    roles = ("input",)
    tensors: ClassVar = {"scale": "float32", "group_bits": "int32"}

    group_bits: NDArray[np.int32]

    @property
    def code_bits(self) -> int:
        return MOST_BITS

    def problem(self, site: str) -> str | None:
        return bits_problem(site, self.group_bits)

    @classmethod
    def fixed(cls, bits: int, **options: str) -> Fixed:
        return {"group_bits": parse(options.get("group_bits", str(bits)))}

    @classmethod
    def initial(cls, low: Tensor, high: Tensor, bits: int, fixed: Mapping[str, Any]) -> Parameters:
        q = 2.0 ** (low.new_tensor(fixed["group_bits"]) - 1)
        return {"scale": rounding.usable(low.abs().maximum(high.abs()) / (q - 0.5))}

    @classmethod
    def fake_quantize(cls, x: Tensor, bits: int, tensors: Parameters) -> Tensor:
        q = 2.0 ** (tensors["group_bits"] - 1)
        return (x / tensors["scale"]).round_().maximum(-q).minimum(q - 1).mul_(tensors["scale"])

    def constants(self) -> dict[str, Float32]:
        """`low` and `high`: the ends of each group's range."""
        return {"scale": self.scale} | ends(self.scale, self.group_bits)

    def parts(self, ops: Arithmetic[V], x: V) -> Iterator[Part[V]]:
        yield ops.rounded(clipped(ops, x), "scale")

    torch_parts = graph_parts = parts


def parse(text: str) -> tuple[int, ...]:
    """'8/6/4', the bits of each group. Raises ValueError."""
    bits = tuple(int(each) for each in text.split("/"))
    if not all(2 <= each <= MOST_BITS for each in bits):
        raise ValueError(f"{min(bits)}..{max(bits)} bits, expected 2..{MOST_BITS}")
    return bits


def ends(scale: Float32, bits: NDArray[np.int32]) -> dict[str, Float32]:
    """The least and the largest value that each group can have, apart from an offset."""
    q = np.exp2(bits - 1).astype(np.float32)
    return {"low": np.asarray(-q * scale), "high": np.asarray((q - 1) * scale)}


def clipped(ops: Arithmetic[V], x: V) -> V:
    """x between the two ends."""
    return ops.minimum(ops.maximum(x, ops.constant("low", x)), ops.constant("high", x))


def bits_problem(site: str, bits: NDArray[np.int32]) -> str | None:
    if bits.min() < 2 or bits.max() > MOST_BITS:
        return f"'{site}.group_bits' holds {bits.min()}..{bits.max()}, expected 2..{MOST_BITS}"
    return None
