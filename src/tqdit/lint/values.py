"""What is known about one tensor before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True)
class Value:
    """`constant`: every backend can compute it at build time. `dtype` is 0 where unknown.

    Of constants: `shape`, `array` where it is small and at hand, and `origin`, the initializer that it is a copy of up
    to its type and layout. `quantized` where it comes from a DequantizeLinear through nothing but layout.
    """

    constant: bool = False
    dtype: int = TensorProto.UNDEFINED
    shape: tuple[int, ...] | None = None
    array: NDArray[Any] | None = None
    origin: str = ""
    quantized: Quantized | None = None

    @property
    def size(self) -> int | None:
        """Number of elements, where the shape is known."""
        return None if self.shape is None else int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Quantized:
    """The DequantizeLinear behind a value. `axis` is that of a per-channel scale in the layout of the value that
    carries this, None where the scale is one number, blocked, or the layout changed beyond following."""

    node: str
    data: Value
    scale: Value
    axis: int | None


UNKNOWN = Value()


def type_name(dtype: int) -> str:
    """`float16` for 10, and so on."""
    known = dtype and dtype in TensorProto.DataType.values()
    return str(TensorProto.DataType.Name(dtype)).lower() if known else "of unknown type"


def per_channel(scale: Value) -> bool:
    """One scale per index of one axis; a single element in one dimension is one scale for the whole tensor."""
    return scale.shape is not None and len(scale.shape) == 1 and scale.shape[0] > 1


def blocked(scale: Value) -> bool:
    """A scale of the tensor's own rank: per block, or per token."""
    return scale.shape is not None and len(scale.shape) > 1 and (scale.size or 0) > 1
