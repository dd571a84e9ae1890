"""What a quantization scheme is. Each file of `tqdit.quantization.schemes` defines one.

A scheme is a frozen dataclass of its parameters. All that the stages ask about it is a method here: what the scale
table stores, how the search starts and what it tries, how torch rounds, and how a product with the quantized tensor is
computed. That last part, the *form*, is written once, in a small vocabulary (`Arithmetic`): the fake-quantized network
computes the operations with torch, the exporter adds them to an ONNX graph.

Symbols: k bits, q = 2^(k-1), s a scale, o a zero point, G groups of timesteps, E independent entries of a parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tqdit.quantization.granularity import Granularity, Role

if TYPE_CHECKING:
    from torch import Tensor

V = TypeVar("V")  # a value: a tensor of torch, or a value of an ONNX graph
Float32 = NDArray[np.float32]
Shape = tuple[int | None, ...]
Rounding = Literal["integer", "simulated", "codes", "int8"]
Parameters = dict[str, "Tensor"]
Fixed = Mapping[str, Any]  # numbers, or tuples of one for each entry


@dataclass(frozen=True)
class Part(Generic[V]):
    """A term of a quantized tensor: x^ is the sum of `unit * values * ratio + offset` over its parts.

    A product takes `values`; its result is multiplied by `ratio`, if there is one. `offset` needs a constant right
    operand: its row sums times `offset` are added to the result. `unit` is 1 unless `values` are integer codes.
    """

    values: V
    ratio: V | None = None
    offset: V | None = None
    unit: float = 1.0


@dataclass(frozen=True)
class RegionOps:
    """The custom ops that round a softmax by two scales: their types, and the names of the two scales."""

    softmax: str
    attention: str  # with both products of attention in one node
    integer_attention: str  # the same of int8
    low: str = "low_scale"
    high: str = "high_scale"
    outputs: int = 1  # of the first op


class Arithmetic(Protocol[V]):
    """The operations of a form, for one quantizer. Names are those of `Quantizer.constants`."""

    def constant(self, name: str, x: V) -> V:
        """The constant itself, or, if it has one entry per group, that of each row's group; it broadcasts against x."""

    def add(self, x: V, y: V) -> V: ...

    def subtract(self, x: V, y: V) -> V: ...

    def multiply(self, x: V, y: V) -> V: ...

    def divide(self, x: V, y: V) -> V: ...

    def maximum(self, x: V, y: V) -> V: ...

    def minimum(self, x: V, y: V) -> V: ...

    def absolute(self, x: V) -> V: ...

    def largest(self, x: V) -> V:
        """max x over the last axis, (..., 1)."""

    def smallest(self, x: V) -> V:
        """min x over the last axis, (..., 1)."""

    def negative(self, x: V) -> V:
        """min(x, 0)."""

    def positive(self, x: V) -> V:
        """max(x, 0)."""

    def rounded(self, x: V, scale: str) -> Part[V]:
        """s_ref clip(round(x / r[g] / s_ref), -q, q - 1), with ratio r[g]: `factor_scales` gives s_ref and r."""


class GraphArithmetic(Arithmetic[V], Protocol[V]):
    """The same in an ONNX graph, with all of its operators."""

    @property
    def rounding(self) -> Rounding:
        """integer: QuantizeLinear and DequantizeLinear; simulated: float operations; codes: these, not yet scaled;
        int8: QuantizeLinear alone."""

    def op(self, op_type: str, *inputs: V) -> V:
        """Add a node of the standard operators; returns its output."""

    def softmax_in_regions(self, probabilities: V, ops: RegionOps) -> Sequence[V]:
        """Replace the Softmax that makes `probabilities` by the op that rounds; returns the op's outputs."""


@dataclass(frozen=True, eq=False)
class Quantizer(ABC):
    """Parameters of one quantized tensor. A subclass adds a field for each entry of `tensors`.

    One without tensors finds its scales while the network runs; its granularity is per token.

    A scheme for weights has the tensor `scale` and int8 codes c with x^ = s c: engines know no other weights.
    """

    scheme: ClassVar[str]  # its name, in scale tables and in the knobs of a calibration
    roles: ClassVar[tuple[Role, ...]]  # of the tensors that it can quantize
    tensors: ClassVar[Mapping[str, str]]  # what the scale table stores: name -> dtype
    plotted: ClassVar[str] = "scale"  # the tensor that a plot over groups shows
    softmax: ClassVar[RegionOps | None] = None  # if custom ops round a softmax in two regions

    bits: int
    granularity: Granularity

    # the scale table --------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The tensors of the scale table, by name."""
        return {name: getattr(self, name) for name in self.tensors}

    def shape(self, name: str, scales: Shape) -> Shape:
        """Shape of one of `tensors`, if the granularity gives the shape `scales`."""
        return scales

    def problem(self, site: str) -> str | None:
        """What is wrong with the values of the tensors of `site`, a message without its last sentence.

        Types, shapes, and that float values are positive and finite are checked for every scheme.
        """
        return None

    # the search -------------------------------------------------------------------------------------------------------

    @classmethod
    def fixed(cls, bits: int, **options: str) -> Fixed:
        """Parameters that no search changes; `options` are settings of the calibration for this scheme."""
        return {}

    @classmethod
    @abstractmethod
    def initial(cls, low: Tensor, high: Tensor, bits: int, fixed: Mapping[str, float]) -> Parameters:
        """Parameters (E,) for tensors with the ranges low..high (E,), in the order in which a search visits them."""

    @classmethod
    def candidates(cls, name: str, initial: Tensor, factors: Tensor, bits: int, fixed: Mapping[str, float]) -> Tensor:
        """What the search tries for one parameter, (n, E), in increasing order of range; `factors` (m,) around 1."""
        return factors[:, None] * initial[None]

    @classmethod
    def resolve(cls, parameters: Parameters, bits: int) -> Parameters:
        """`tensors` from the parameters of the search, fixed ones included."""
        return parameters

    @classmethod
    @abstractmethod
    def fake_quantize(cls, x: Tensor, bits: int, tensors: Parameters) -> Tensor:
        """x^ float32, of x's shape: the definition of the scheme. The `tensors` broadcast against x."""

    # rounding and the product -----------------------------------------------------------------------------------------

    @property
    def code_bits(self) -> int:
        """To how many bits `Arithmetic.rounded` clips."""
        return self.bits

    def constants(self) -> dict[str, Float32]:
        """The numbers that the forms use, float32, of shape () or (G,)."""
        return {name: array for name, array in self.arrays().items() if array.dtype == np.float32}

    @abstractmethod
    def torch_parts(self, ops: Arithmetic[Tensor], x: Tensor) -> Iterator[Part[Tensor]]:
        """The form that torch computes: the parts of x^."""

    @abstractmethod
    def graph_parts(self, ops: GraphArithmetic[V], x: V) -> Iterator[Part[V]]:
        """The form that an ONNX graph holds: the parts of x^."""


def factor_scales(scales: Float32) -> tuple[Float32, Float32]:
    """(s_ref, r) with s[g] = s_ref r[g], s_ref = max s[g]: shapes () and that of `scales`, both float32.

    The one place that factors scales: an export and the fake-quantized network must agree to the last bit.
    """
    reference = np.asarray(scales.max(), dtype=np.float32)
    return reference, np.asarray(scales / reference, dtype=np.float32)
