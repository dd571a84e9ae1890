"""Linear layers and convolutions: int8 weights, and inputs as their schemes say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from tqdit.errors import UsageError
from tqdit.exporter.passes.emit import Emitter, dequantize
from tqdit.exporter.passes.groups import GroupSelector
from tqdit.exporter.passes.operands import GraphOperand, multiply, rank_of, replace
from tqdit.exporter.passes.scopes import Modules
from tqdit.models.products import Convolution
from tqdit.models.weights import IN_MEMORY, Weights
from tqdit.quantization.fake_quant import weight_codes, weight_scale
from tqdit.quantization.granularity import PerChannel
from tqdit.quantization.quantizer import Quantizer
from tqdit.quantization.table import ScaleTable, Site

Product = Callable[[ir.Value], ir.Value]
PATCHES_RANK = 3  # (N, T, C p p)


def quantize_linears(
    model: ir.Model, network: nn.Module, table: ScaleTable, groups: GroupSelector, weights: Weights = IN_MEMORY
) -> None:
    """Requires: a float trace of `network` whose linear layers are MatMul + Add or Gemm, convolutions one Conv.

    Ensures: for every site of the table on a linear layer or a convolution, weights are int8 initializers behind a
    DequantizeLinear, inputs pass Q/DQ with constant scales, in the order of operations of docs/scale-table.md. The
    float weights have no consumer any more.
    """
    modules = Modules(model)
    for name, sites in table.by_module.items():
        module = network.get_submodule(name)
        if isinstance(module, nn.Linear):
            for node in modules.all(name, "MatMul", "Gemm"):
                _Linear(model.graph, node, name, module, sites, groups, weights).rewrite()
        elif isinstance(module, Convolution):
            for node in modules.all(name, "Conv"):
                _PatchEmbedding(model.graph, node, name, module, sites, groups, weights).rewrite()


class _Linear:
    """One product with a constant weight: MatMul (its bias is an Add of its own) or Gemm (its bias is inside).

    Both become MatMul with W^ transposed, and what scales its output.
    """

    def __init__(
        self, graph: ir.Graph, node: ir.Node, name: str, module: nn.Linear | Convolution, sites: Mapping[str, Site],
        groups: GroupSelector, weights: Weights,
    ) -> None:  # fmt: skip
        self.node, self.name, self.module, self.sites, self.groups = node, name, module, sites, groups
        self.weights = weights
        self.emit = Emitter(graph, node, name)
        self.rank = PATCHES_RANK if isinstance(module, Convolution) else rank_of(node.outputs[0])  # of the input

    def rewrite(self) -> None:
        assert self.node.inputs[0] is not None
        x = self.enter(self.node.inputs[0])
        weight, sums = self.weight()

        def product(x: ir.Value) -> ir.Value:
            return self.emit.op("MatMul", x, weight)

        site = self.sites.get("input")
        y = product(x) if site is None else self.quantized(x, site.quantizer, product, sums)
        if len(self.node.inputs) == 3 and (bias := self.node.inputs[2]) is not None:
            y = self.emit.op("Add", y, bias)
        replace(self.emit.graph, self.node, self.leave(y))

    def enter(self, x: ir.Value) -> ir.Value:
        """The input as rows of the product."""
        return x

    def leave(self, y: ir.Value) -> ir.Value:
        """The product's output in the shape that the trace expects next."""
        return y

    def quantized(
        self, x: ir.Value, quantizer: Quantizer, product: Product, sums: Callable[[], NDArray[np.float32]]
    ) -> ir.Value:
        """x^ W^T, an offset b of x^ adding b rowsum(W^)."""

        def shift(offset: ir.Value) -> ir.Value:
            if offset.const_value is not None:
                return self.emit.constant("input.shift", offset.const_value.numpy() * sums())
            return self.emit.op("Mul", offset, self.emit.constant("weight.sums", sums()))

        operand = GraphOperand(self.emit, quantizer, "input", self.rank, self.groups, "integer")
        return multiply(self.emit, operand.parts(x), product, shift)

    def weight(self) -> tuple[ir.Value, Callable[[], NDArray[np.float32]]]:
        """W^ transposed (K, D), int8 behind a DequantizeLinear if it is quantized, and its row sums (D,).

        Its values are made when the graph is written: the graph holds no copy of the weights.
        """
        rows = self.module.weight.shape[0]
        shape = (self.module.weight[0].numel(), rows)
        if "weight" not in self.sites:
            value = self.emit.lazy("weight_transposed", shape, np.float32, lambda: self.float_weight().T)
            return value, lambda: self.float_weight().sum(axis=1)
        site = self.sites["weight"]
        granularity = site.quantizer.granularity
        if isinstance(granularity, PerChannel) and granularity.axis != 0:
            raise UsageError(
                f"'{site.name}' has one scale per index of axis {granularity.axis}; engines need one per output "
                "channel (axis 0). Calibrate again."
            )
        scales = weight_scale(self.module.weight.shape, site)
        scale = scales.numpy().reshape(-1 if scales.ndim else ()).astype(np.float32)

        def codes() -> NDArray[np.int8]:
            values, _ = weight_codes(self.weights.read(self.module.weight), site)
            return values.flatten(1).to(torch.int8).numpy()

        def sums() -> NDArray[np.float32]:
            total: NDArray[np.int64] = codes().sum(axis=1, dtype=np.int64)
            return total.astype(np.float32) * scale

        stored = self.emit.lazy("weight.codes", shape, np.int8, lambda: codes().T)
        return dequantize(self.emit, "weight", stored, scale, axis=1), cache(sums)

    def float_weight(self) -> NDArray[np.float32]:
        """(D, K)."""
        return self.weights.read(self.module.weight).flatten(1).numpy()


class _PatchEmbedding(_Linear):
    """Conv whose stride is its kernel: a linear layer on patches, which every backend multiplies in integers.

    Engines keep an int8 convolution only if its output is quantized too, which it is not here.
    """

    def enter(self, x: ir.Value) -> ir.Value:
        """(N, C, H, W) -> (N, T, C p p), T = (H // p)(W // p), with any number of axes in the place of H and W."""
        assert isinstance(self.module, Convolution)
        assert x.shape is not None
        size = self.module.kernel_size
        channels, *sides = (int(str(side)) for side in x.shape[1:])
        self.grid = [side // step for side, step in zip(sides, size, strict=True)]
        whole = [tiles * step for tiles, step in zip(self.grid, size, strict=True)]
        if whole != sides:
            ends, axes = np.array(whole, np.int64), np.arange(len(size)) + 2
            bounds = {"start": np.zeros_like(ends), "end": ends, "axes": axes}
            x = self.emit.op("Slice", x, *(self.emit.constant(f"patches.{name}", a) for name, a in bounds.items()))
        lengths, outer, inner = [channels], [], []
        for tiles, step in zip(self.grid, size, strict=True):
            lengths.append(tiles)
            outer.append(len(lengths))
            if step > 1:
                lengths.append(step)
                inner.append(len(lengths))
        if inner:
            x = self.reshape(x, "patches.split", lengths)
        x = self.emit.op("Transpose", x, perm=[0, *outer, 1, *inner])
        return self.reshape(x, "patches.rows", [math.prod(self.grid), channels * math.prod(size)])

    def leave(self, y: ir.Value) -> ir.Value:
        """(N, T, D) -> (N, D, H // p, W // p)."""
        y = self.emit.op("Transpose", y, perm=[0, 2, 1])
        return self.reshape(y, "patches.grid", [len(self.module.weight), *self.grid])

    def reshape(self, x: ir.Value, name: str, trailing: list[int]) -> ir.Value:
        return self.emit.op("Reshape", x, self.emit.constant(name, np.array([0, *trailing], np.int64)))
