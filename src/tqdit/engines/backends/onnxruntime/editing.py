"""A graph being rewritten: who makes and who reads each value, and what each node becomes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

DOMAIN, INTEGER_PRODUCT = "com.microsoft", "MatMulIntegerToFloat"  # ONNX Runtime's own operator
INT8, UINT8 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8
MIDDLE = 128  # the zero point of int8 codes as uint8


class Editor:
    """Collects changes of a model's graph; `finish` makes them. weights: the folder of the file's external data."""

    def __init__(self, model: onnx.ModelProto, weights: Path) -> None:
        self._model, self._weights, graph = model, weights, model.graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self._outputs = {value.name for value in graph.output}
        self.replaced: dict[int, list[onnx.NodeProto]] = {}  # what stands in the place of a node, by its id
        self.removed: set[int] = set()
        self.retyped: set[str] = set()  # values of another type or shape than before

    def value(self, name: str) -> NDArray[Any]:
        """Of a constant."""
        tensor = self.constants[name]
        if uses_external_data(tensor):
            tensor = onnx.TensorProto.FromString(tensor.SerializeToString())
            load_external_data_for_tensor(tensor, str(self._weights))
        return numpy_helper.to_array(tensor)

    def constant(self, name: str, value: Any, dtype: type[np.generic]) -> str:
        """The name of a new constant, or of the one that has this name."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
            self._model.graph.initializer.append(self.constants[name])
        return name

    def uint8(self, code: int) -> str:
        return self.constant(f"tqdit.uint8.{code}", code, np.uint8)

    def is_scalar(self, name: str) -> bool:
        return name in self.constants and not self.constants[name].dims

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self._outputs else None

    def is_for(self, node: onnx.NodeProto, reader: onnx.NodeProto) -> bool:
        """Whether one node alone reads what another one makes."""
        return self.only_reader(node.output[0]) is reader

    def is_int8_weight(self, node: onnx.NodeProto) -> bool:
        """Whether a DequantizeLinear has a constant int8 matrix around 0 with one scale, or one of each column."""
        weight, scale = (self.constants.get(name) for name in node.input[:2])
        if weight is None or scale is None or weight.data_type != INT8 or len(weight.dims) != 2:
            return False
        in_blocks = any(each.name == "block_size" and each.i for each in node.attribute)
        return not in_blocks and list(scale.dims) in ([], list(weight.dims[1:])) and self.is_symmetric(node)

    def is_symmetric(self, node: onnx.NodeProto) -> bool:
        """Whether a DequantizeLinear has the zero point 0 of int8."""
        if len(node.input) == 2:
            return True
        zero = self.constants.get(node.input[2])
        return zero is not None and zero.data_type == INT8 and not self.value(node.input[2]).any()

    def finish(self) -> None:
        graph = self._model.graph
        nodes = [new for node in graph.node for new in self.replaced.get(id(node), [node])]
        nodes = [node for node in nodes if id(node) not in self.removed]
        del graph.node[:]
        graph.node.extend(nodes)
        known = [info for info in graph.value_info if info.name not in self.retyped]
        del graph.value_info[:]
        graph.value_info.extend(known)
        if all(entry.domain != DOMAIN for entry in self._model.opset_import):
            self._model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def make_node(
    like: onnx.NodeProto, op_type: str, inputs: Collection[str], output: str, name: str = "", **more: Any
) -> onnx.NodeProto:
    """A node of the module of another one; its name is that of its output if it has no other."""
    made = onnx.helper.make_node(op_type, list(inputs), [output], name=name or output, **more)
    made.metadata_props.extend(like.metadata_props)
    return made
