"""A model as the rules see it: its nodes in order, functions inlined, with what is known about their inputs.

onnx_ir inlines functions and infers types and shapes. A scale that a function takes as an input or as an attribute is
therefore judged by what each call passes. Subgraphs see the values around them. Weights are never read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx_ir as ir
from onnx import ModelProto
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from tqdit.errors import FileFormatError
from tqdit.lint.values import UNKNOWN, Value, Values

STANDARD = ("", "ai.onnx")
MAX_NODES = 100_000  # a file with more nodes once its functions are inlined is read without inlining
_SCOPES = "pkg.torch.onnx.name_scopes"
# Without a handler, Python would print the library's remarks about damaged files to stderr.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())


@dataclass(frozen=True, eq=False)
class GraphNode:
    """One node. `label` names it for people; `opset` is that of its graph or function."""

    ir_node: ir.Node
    inputs: tuple[Value, ...]
    label: str
    opset: int
    input_names: tuple[str, ...]  # as the file has them: inlining renames; '' for an input that is left out

    @property
    def op_type(self) -> str:
        return self.ir_node.op_type

    @property
    def standard(self) -> bool:
        return self.ir_node.domain in STANDARD

    @property
    def scope(self) -> str:
        """The torch module that the node was traced from, '' if unknown.

        PyTorch's exporter notes a list in Python's spelling whose last entry is the node.
        """
        names = [name.strip(" '\"") for name in self.ir_node.metadata_props.get(_SCOPES, "").strip("[]").split(",")]
        return names[-2] if len(names) > 1 else ""

    def given(self, index: int) -> bool:
        """Whether the node has its input number `index`."""
        return len(self.ir_node.inputs) > index and self.ir_node.inputs[index] is not None

    def value(self, index: int) -> Value:
        return self.inputs[index] if index < len(self.inputs) else UNKNOWN

    def integer(self, name: str, default: int) -> int:
        return self.ir_node.attributes.get_int(name, default)


@dataclass(frozen=True, eq=False)
class Program:
    file: ir.Model  # with functions and their calls
    nodes: tuple[GraphNode, ...]  # without
    opset: int

    def standard_nodes(self, *op_types: str) -> Iterator[GraphNode]:
        """The nodes of these standard operators, in order."""
        return (node for node in self.nodes if node.op_type in op_types and node.standard)


def read_program(model: ModelProto, folder: Path | None = None) -> Program:
    """`folder` holds the external data; small constants are read from there.

    Raises FileFormatError if the graph is not one that ONNX allows, or has parts that onnx_ir does not read.
    """
    try:
        file, read = _read(model, folder), _read(model, folder)
        if not _inline(read):
            read = _read(model, folder)
            read.functions.clear()  # or the inference of shapes would go into them, call by call
        ShapeInferencePass(check_type=False, strict_mode=False)(read)
        nodes = tuple(_nodes(read, folder))
    except Exception as error:  # onnx_ir raises errors of many kinds for such graphs
        reason = " ".join(str(_first_cause(error)).split())[:160]
        raise FileFormatError(
            f"the ONNX graph is damaged, or has parts that onnx_ir does not read ({reason}). Export it again."
        ) from error
    return Program(file, nodes, _opset(file.opset_imports))


def _first_cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _first_cause(error.__cause__)


def _opset(imports: Mapping[str, int]) -> int:
    """The version of ONNX's own operators; 1 if none is named, as the specification has it."""
    return next((version for domain, version in imports.items() if domain in STANDARD), 1)


def label_of(node: ir.Node) -> str:
    return str(node.meta["origin"][0])


def _read(model: ModelProto, folder: Path | None) -> ir.Model:
    """The model; the `meta` of each node, which inlining keeps, holds what `GraphNode` says of its origin."""
    read = ir.from_proto(model)
    if folder is not None:
        ir.external_data.set_base_dir(read.graph, folder)
    _mark(read.graph, "", _opset(read.opset_imports))
    for function in read.functions.values():
        _mark(function, f"{function.name}/", _opset(function.opset_imports))
    return read


def _mark(nodes: ir.Graph | ir.Function, path: str, opset: int) -> None:
    for node in nodes:
        first = next((output.name or "" for output in node.outputs), "")
        label = path + (node.name or f"{node.op_type} -> {first}")
        names = tuple((value.name or "") if value is not None else "" for value in node.inputs)
        node.meta["origin"] = label, opset, names
        for name, graph in _subgraphs(node):
            _mark(graph, f"{label}/{name}/", opset)


def _subgraphs(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from ((name, graph) for graph in attribute.as_graphs())


def _inline(model: ir.Model) -> bool:
    """Inline in place. False if the functions cannot be inlined, which may leave the model half changed."""

    @cache
    def size(key: ir.OperatorIdentifier) -> int:
        return size_of(model.functions[key])

    def size_of(body: ir.Graph | ir.Function) -> int:
        """Nodes after inlining."""
        keys = (node.op_identifier() for node in body.all_nodes())
        return sum(size(key) if key in model.functions else 1 for key in keys)

    for function in model.functions.values():
        for domain in model.opset_imports:  # a function of another opset has a rule of its own, and is inlined
            function.opset_imports.pop(domain, None)
    try:
        if size_of(model.graph) > MAX_NODES:
            return False
        InlinePass()(model)
    except (ValueError, RuntimeError):  # as for a function that calls itself, or a call with too many inputs
        return False
    return True


def _nodes(model: ir.Model, folder: Path | None) -> Iterator[GraphNode]:
    values = Values(overridable=(model.ir_version or 0) >= 4, read_external=folder is not None)
    for ir_node in model.graph.all_nodes():
        node = GraphNode(ir_node, tuple(values.of(value) for value in ir_node.inputs), *ir_node.meta["origin"])
        values.add(node)
        yield node


def quantized_type(node: GraphNode) -> ir.DataType:
    """The integer type that a QuantizeLinear writes: its zero point's, else `output_dtype`, else uint8."""
    if node.given(2):
        return node.value(2).dtype
    return ir.DataType(node.integer("output_dtype", 0) or ir.DataType.UINT8)
