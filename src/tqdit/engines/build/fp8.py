"""The quantized linear layers of an int8 file in FP8 (E4M3): `tqdit-build --precision fp8`.

E4M3 has a sign, 4 bits of exponent and 3 of mantissa; its largest number is 448 (arXiv 2209.05433). The file's scales
stay: int8 codes are at most 128, so what int8 clips has room up to 448 here. A number has its own exponent, so two
regions after GELU become one product, and a zero point is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from tqdit.card import GraphCard
from tqdit.engines.build.strip import product_after, replace_softmaxes, strip_product
from tqdit.errors import UsageError
from tqdit.golden import GoldenCalls, relative_errors
from tqdit.graph_names import SCOPE_KEY, scope_of
from tqdit.plugins.time_group_select.schema import OP_TYPE as TIME_GROUP_SELECT

E4M3 = ir.DataType.FLOAT8E4M3FN
BEFORE = ("Clip", "Div", "Sub", "Min", "Max")  # what stands between an input and its QuantizeLinear


def quantize_to_fp8(model: ir.Model, card: GraphCard) -> GraphCard:
    """Requires: a quantized float32 file of ours, with scopes in the nodes' metadata.

    Ensures: each linear layer that was int8 multiplies E4M3 by E4M3, once: inputs pass QuantizeLinear and
    DequantizeLinear with the scale that the file has (of two regions the larger one), weights are the int8 codes
    rounded to E4M3 behind a DequantizeLinear. Ratios of time groups and of tokens stay; offsets of zero points go.
    Integer products of attention become float ones, as the card says that is returned. Raises UsageError for offsets
    that are computed for each token.
    """
    assert card.quantization is not None
    products = dict(card.quantization.products)
    scopes: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type == "MatMul":
            scopes.setdefault(scope_of(node), []).append(node)
    if card.quantization.attention == "integer":
        replace_softmaxes(model.graph)
    for module, form in card.quantization.products.items():
        if form == "integer" and not _has_weight(scopes[module][0]):
            strip_product(model.graph, module, scopes[module])
            products[module] = "float"
        elif form == "integer":
            calls: dict[ir.Value, list[ir.Node]] = {}
            for product in scopes[module]:
                calls.setdefault(product_after(product, module), []).append(product)
            for number, (out, regions) in enumerate(calls.items()):
                _Layer(model.graph, module, regions, out, f"fp8.{number}").rewrite()
    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)
    attention = "float" if products != card.quantization.products else card.quantization.attention
    return replace(card, quantization=replace(card.quantization, products=products, attention=attention))


def _has_weight(product: ir.Node) -> bool:
    """Whether it is that of a linear layer; the others are those of attention."""
    codes = _maker(product.inputs[1]).inputs[0]
    return codes is not None and codes.const_value is not None


@dataclass(frozen=True)
class _Input:
    """x / ratio / scale."""

    x: ir.Value
    ratio: ir.Value | None
    scale: ir.Value

    @property
    def step(self) -> float:
        assert self.scale.const_value is not None
        return float(self.scale.const_value.numpy())


class _Layer:
    """One call of a layer: its products, and the value that they make."""

    def __init__(self, graph: ir.Graph, module: str, regions: list[ir.Node], out: ir.Value, name: str) -> None:
        self.graph, self.module, self.regions, self.out, self.name = graph, module, regions, out, name
        self.numbers = count()

    def rewrite(self) -> None:
        first = self.regions[0]
        source = max((self._input(_maker(region.inputs[0])) for region in self.regions), key=lambda one: one.step)
        dequantize = _maker(first.inputs[1])
        codes = dequantize.inputs[0]
        assert codes is not None
        assert codes.const_value is not None
        x = source.x if source.ratio is None else self._op("Div", source.x, source.ratio)
        zero = self._initializer(f"{self.module}.fp8.zero_point", np.zeros((), np.float32))
        quantized = self._op("QuantizeLinear", x, source.scale, zero)
        left = self._op("DequantizeLinear", quantized, source.scale, zero)
        weight = self._initializer(f"{self.module}.weight.fp8", codes.const_value)
        scale = dequantize.inputs[1]
        assert scale is not None
        axis = {"axis": 1} if scale.shape else {}
        y = self._op("MatMul", left, self._op("DequantizeLinear", weight, scale, **axis))
        if source.ratio is not None:
            y = self._op("Mul", y, source.ratio)
        y.type, y.shape = self.out.type, self.out.shape
        self.out.replace_all_uses_with(y, replace_graph_outputs=True)

    def _input(self, dequantize: ir.Node) -> _Input:
        """What the quantizer of a region takes, without its clipping and its offset."""
        quantize = _maker(dequantize.inputs[0])
        if quantize.op_type != "QuantizeLinear":
            raise UsageError(
                f"--precision fp8: '{self.module}' takes int8 from a fused attention, which has no form for fp8. "
                "Export with --attention float."
            )
        value, scale = quantize.inputs[0], quantize.inputs[1]
        assert value is not None
        assert scale is not None
        ratio: ir.Value | None = None
        node = value.producer()
        while node is not None and scope_of(node) == self.module and node.op_type in BEFORE:
            if node.op_type == "Div":
                ratio = node.inputs[1]
            if node.op_type == "Sub" and not _is_table(node.inputs[1]):
                raise UsageError(
                    f"--precision fp8: '{self.module}' has an offset for each token, which fp8 has no form for. "
                    "Calibrate with --inputs dynamic."
                )
            value = node.inputs[0]
            assert value is not None
            node = value.producer()
        return _Input(value, ratio, scale)

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        name = f"{self.module}/{op_type}.{self.name}.{next(self.numbers)}"
        node = ir.node(op_type, inputs, attributes, name=name, metadata_props={SCOPE_KEY: self.module})
        node.outputs[0].name = f"{name}:0"
        self.graph.insert_before(_maker(self.out), node)  # where the ratios of all regions are known
        return node.outputs[0]

    def _initializer(self, name: str, codes: NDArray[np.float32] | ir.TensorProtocol) -> ir.Value:
        """Numbers rounded to E4M3, once for all calls of the layer."""
        if name not in self.graph.initializers:
            array = codes if isinstance(codes, np.ndarray) else codes.numpy().astype(np.float32)
            tensor = ir.tensor(array.astype(E4M3.numpy()), dtype=E4M3, name=name)
            value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(E4M3), const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]


def _maker(value: ir.Value | None) -> ir.Node:
    node = None if value is None else value.producer()
    assert node is not None
    return node


def _is_table(value: ir.Value | None) -> bool:
    """A constant, or the entry of a table for each row."""
    if value is None or value.is_initializer():
        return value is not None
    node = value.producer()
    return node is not None and node.op_type == TIME_GROUP_SELECT


def expect(calls: GoldenCalls, file: Path, rows: int) -> GoldenCalls:
    """The calls with the errors that an FP8 file has in ONNX Runtime on the CPU, `rows` rows at a time: those of the
    table are int8's. Raises MissingLibraryError without ONNX Runtime.
    """
    from tqdit.engines.backends.onnxruntime.run import OrtEngine

    engine = OrtEngine(file, None)
    found = []
    for call in range(len(calls)):
        inputs = {name: np.repeat(array[call : call + 1], rows, axis=0) for name, array in calls.inputs.items()}
        found.append(engine(inputs)[:1].copy())
    engine.close()
    return replace(calls, errors=relative_errors(np.concatenate(found), calls.prediction))
