"""Linear layers and convolutions: int8 weights, Q/DQ inputs, exact foldings of asymmetric and grouped inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from tqdit.calibrate.fake_quant import weight_codes
from tqdit.errors import UsageError
from tqdit.export.passes.emit import Emitter, dequantize, quantize_dequantize
from tqdit.export.passes.groups import RowGroups, Step
from tqdit.export.passes.scopes import Modules
from tqdit.scale_table import Asymmetric, PerChannel, Quantizer, ScaleTable, Site, Symmetric, TwoRegionGelu

Product = Callable[[ir.Value], ir.Value]


def quantize_linears(model: ir.Model, network: nn.Module, table: ScaleTable, groups: RowGroups) -> None:
    """Requires: a float trace of `network` whose linear layers are MatMul + Add or Gemm, convolutions one Conv.

    Ensures: for every site of the table on a linear layer or a convolution, weights are int8 initializers behind a
    DequantizeLinear, inputs pass Q/DQ with constant steps, in the order of operations of docs/scale-table.md. The float
    weights have no consumer any more.
    """
    modules = Modules(model)
    for name, sites in table.by_module.items():
        module = network.get_submodule(name)
        if isinstance(module, nn.Linear):
            _Linear(model.graph, modules.one(name, "MatMul", "Gemm"), name, module, sites, groups).rewrite()
        elif isinstance(module, nn.Conv2d):
            _Convolution(model.graph, modules.one(name, "Conv"), name, module, sites, groups).rewrite()


class _Layer:
    """One product with a constant weight. Subclasses say how the weight lies and which node multiplies."""

    rank: int  # of the input

    def __init__(
        self, graph: ir.Graph, node: ir.Node, name: str, module: nn.Linear | nn.Conv2d, sites: Mapping[str, Site],
        groups: RowGroups,
    ) -> None:  # fmt: skip
        self.node, self.name, self.module, self.sites, self.groups = node, name, module, sites, groups
        self.emit = Emitter(graph, node, name)
        # each input channel is divided by its entry and the weight multiplied, so that channels have equal ranges
        self.divisor = sites["input"].divisor if "input" in sites else None
        self.float_weight = module.weight.detach()
        if self.divisor is not None:
            self.float_weight = self.float_weight * torch.from_numpy(np.array(self.divisor))

    def rewrite(self) -> None:
        x = self.node.inputs[0]
        assert x is not None
        weight, sums = self.weight()
        product = self.product(weight)
        site = self.sites.get("input")
        if self.divisor is not None:
            x = self.emit.op("Div", x, self.emit.constant("input.divisor", self.divisor))
        y = product(x) if site is None else self.quantized(x, site.quantizer, product, sums)
        bias = self.own_bias()
        if bias is not None:
            y = self.emit.op("Add", y, bias)
        self.node.outputs[0].replace_all_uses_with(y)
        self.emit.graph.remove(self.node, safe=True)

    def quantized(self, x: ir.Value, quantizer: Quantizer, product: Product, sums: NDArray[np.float32]) -> ir.Value:
        match quantizer:
            case Symmetric(bits=bits, scale=scale):
                return self.scaled(x, Step(scale, self.groups), bits, product, "input")
            case Asymmetric():
                return self.asymmetric(x, quantizer, product, sums)
            case TwoRegionGelu(bits=bits, negative_step=negative, positive_step=positive):
                zero = self.emit.constant("input.zero", np.float32(0))
                parts = [
                    self.scaled(self.emit.op(op, x, zero), Step(scale, self.groups), bits, product, f"input.{region}")
                    for op, scale, region in (("Min", negative, "negative"), ("Max", positive, "positive"))
                ]
                return self.emit.op("Add", *parts)
        raise UsageError(f"'{self.name}.input' cannot have the scheme '{quantizer.scheme}'. Calibrate again.")

    def scaled(self, x: ir.Value, step: Step, bits: int, product: Product, name: str) -> ir.Value:
        """Q(x / r) -> product -> * r."""
        x = step.divide(self.emit, x, name, self.rank)
        y = product(quantize_dequantize(self.emit, x, name, step.reference, bits))
        return step.multiply(self.emit, y, name, self.rank)

    def asymmetric(self, x: ir.Value, quantizer: Asymmetric, product: Product, sums: NDArray[np.float32]) -> ir.Value:
        """Q((x - b) / r) -> product -> * r + b rowsum(W^), b = (q - o) s."""
        offset = quantizer.offset
        step = Step(quantizer.scale, self.groups)
        sums_value = self.emit.constant("weight.sums", sums)
        if step.grouped:
            b = self.groups.select(self.emit, "input.offset", offset, self.rank)
            shift = self.emit.op("Mul", b, sums_value)
        else:
            b = self.emit.constant("input.offset", np.float32(offset))
            shift = self.emit.constant("input.shift", np.float32(offset) * sums)
        y = self.scaled(self.emit.op("Sub", x, b), step, quantizer.bits, product, "input")
        return self.emit.op("Add", y, shift)

    def codes(self) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
        """(codes in the weight's own shape, scale () or (output channels,)), or None for a weight that stays float."""
        if "weight" not in self.sites:
            return None
        site = self.sites["weight"]
        granularity = site.quantizer.granularity
        if isinstance(granularity, PerChannel) and granularity.axis != 0:
            raise UsageError(
                f"'{site.name}' has one scale per index of axis {granularity.axis}; engines need one per output "
                "channel (axis 0). Calibrate again."
            )
        values, scale = weight_codes(self.float_weight, site)
        return values.numpy().astype(np.int8), scale.numpy().reshape(-1 if scale.ndim else ()).astype(np.float32)

    def weight(self) -> tuple[ir.Value, NDArray[np.float32]]:
        """The weight as the product takes it, and its row sums as they add to the product's output."""
        raise NotImplementedError

    def product(self, weight: ir.Value) -> Product:
        raise NotImplementedError

    def own_bias(self) -> ir.Value | None:
        """The bias, where the node that was replaced held it."""
        raise NotImplementedError


class _Linear(_Layer):
    """MatMul (its bias is an Add of its own) or Gemm (its bias is inside); both become MatMul with W^ transposed."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]  # the same arguments
        self.rank = 3 if self.node.op_type == "MatMul" else 2

    def weight(self) -> tuple[ir.Value, NDArray[np.float32]]:
        quantized = self.codes()
        if quantized is None:
            weight = self.float_weight.numpy()
            return self.emit.constant("weight_transposed", weight.T), weight.sum(axis=1)
        codes, scale = quantized
        sums = codes.sum(axis=1, dtype=np.int64).astype(np.float32) * scale
        return dequantize(self.emit, "weight", np.ascontiguousarray(codes.T), scale, axis=1), sums

    def product(self, weight: ir.Value) -> Product:
        return lambda x: self.emit.op("MatMul", x, weight)

    def own_bias(self) -> ir.Value | None:
        return self.node.inputs[2] if self.node.op_type == "Gemm" else None


class _Convolution(_Layer):
    """Conv without padding; its bias becomes an Add after the foldings."""

    rank = 4

    def weight(self) -> tuple[ir.Value, NDArray[np.float32]]:
        quantized = self.codes()
        if quantized is None:
            weight = self.float_weight.numpy()
            return self.emit.constant("weight_float", weight), weight.sum(axis=(1, 2, 3)).reshape(-1, 1, 1)
        codes, scale = quantized
        sums = codes.sum(axis=(1, 2, 3), dtype=np.int64).astype(np.float32) * scale
        return dequantize(self.emit, "weight", codes, scale, axis=0), sums.reshape(-1, 1, 1)

    def product(self, weight: ir.Value) -> Product:
        attributes = {name: attribute.value for name, attribute in self.node.attributes.items()}
        return lambda x: self.emit.op("Conv", x, weight, **attributes)

    def own_bias(self) -> ir.Value | None:
        if self.module.bias is None:
            return None
        return self.emit.constant("bias_column", self.module.bias.detach().numpy().reshape(-1, 1, 1))
