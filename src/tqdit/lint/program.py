"""A model as the rules see it: its nodes in order, functions inlined, with what is known about their inputs.

onnx_ir inlines functions and infers types and shapes. A scale that a function takes as an input or as an attribute is
therefore judged by what each call passes. Subgraphs see the values around them. Weights are never read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from tqdit.errors import FileFormatError
from tqdit.lint.values import UNKNOWN, Value, Values

STANDARD = ("", "ai.onnx")
MAX_NODES = 100_000  # a file with more nodes once its functions are inlined is read without inlining,
MAX_DEPTH = 50  # and so is one whose functions call one another deeper than this
_SCOPES = "pkg.torch.onnx.name_scopes"
# Without a handler, Python would print the library's remarks about damaged files to stderr.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())

FunctionKey = tuple[str, str, str]


@dataclass(frozen=True, eq=False)
class GraphNode:
    """One node. `label` names it for people; `scope` is the torch module that it was traced from, '' if unknown."""

    ir_node: ir.Node
    inputs: tuple[Value, ...]

    @property
    def label(self) -> str:
        return str(self.ir_node.meta["label"])

    @property
    def opset(self) -> int:
        return int(self.ir_node.meta["opset"])

    @property
    def op_type(self) -> str:
        return self.ir_node.op_type

    @property
    def standard(self) -> bool:
        return self.ir_node.domain in STANDARD

    @property
    def input_names(self) -> tuple[str, ...]:
        """As the file has them: inlining renames. '' for an input that is left out."""
        return tuple(self.ir_node.meta["inputs"])

    @property
    def scope(self) -> str:
        """From what PyTorch's exporter notes: a list in Python's spelling whose last entry is the node."""
        names = [name.strip(" '\"") for name in self.ir_node.metadata_props.get(_SCOPES, "").strip("[]").split(",")]
        return names[-2] if len(names) > 1 else ""

    def given(self, index: int) -> bool:
        """Whether the node has its input number `index`."""
        return len(self.ir_node.inputs) > index and self.ir_node.inputs[index] is not None

    def value(self, index: int) -> Value:
        return self.inputs[index] if index < len(self.inputs) else UNKNOWN

    def integer(self, name: str, default: int) -> int:
        return integer(self.ir_node, name, default)


@dataclass(frozen=True)
class FunctionCall:
    """A call of a function as the file has it, before inlining."""

    label: str
    key: FunctionKey
    given: tuple[bool, ...]  # for each input of the call


@dataclass(frozen=True)
class Program:
    model: ModelProto
    nodes: tuple[GraphNode, ...]
    calls: tuple[FunctionCall, ...]
    opset: int
    functions: Mapping[FunctionKey, FunctionProto]

    def standard_nodes(self, *op_types: str) -> Iterator[GraphNode]:
        """The nodes of these standard operators, in order."""
        return (node for node in self.nodes if node.op_type in op_types and node.standard)


def read_program(model: ModelProto, folder: Path | None = None) -> Program:
    """`folder` holds the external data; small constants are read from there.

    Raises FileFormatError if the graph is not one that ONNX allows, or has parts that onnx_ir does not read.
    """
    functions = {(function.domain, function.name, function.overload): function for function in model.functions}
    try:
        read = _read(model, folder)
        calls = tuple(_calls(read))
        read = _inline(read) or _read(model, folder)
        ShapeInferencePass(check_type=False, strict_mode=False)(read)
        nodes = tuple(_nodes(read, folder))
    except Exception as error:  # onnx_ir raises errors of many kinds for such graphs
        reason = " ".join(str(_first_cause(error)).split())[:160]
        raise FileFormatError(
            f"the ONNX graph is damaged, or has parts that onnx_ir does not read ({reason}). Export it again."
        ) from error
    return Program(model, nodes, calls, standard_opset(model), functions)


def _first_cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _first_cause(error.__cause__)


def standard_opset(model: ModelProto | FunctionProto) -> int:
    """The version of ONNX's own operators; 1 if none is named, as the specification has it."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in STANDARD), 1)


def function_key(node: NodeProto) -> FunctionKey:
    return (node.domain, node.op_type, node.overload)


def integer(node: ir.Node, name: str, default: int) -> int:
    """An attribute's value, or the default if it is absent or of another type."""
    found = node.attributes.get(name)
    value = None if found is None else found.value
    return value if isinstance(value, int) else default


def _read(model: ModelProto, folder: Path | None) -> ir.Model:
    """The model; the `meta` of each node, which inlining keeps, holds its label, its opset and its inputs' names."""
    read = ir.from_proto(model)
    if folder is not None:
        ir.external_data.set_base_dir(read.graph, folder)
    _mark(read.graph, "", standard_opset(model))
    for key, function in read.functions.items():
        opset = next((version for domain, version in function.opset_imports.items() if domain in STANDARD), 1)
        _mark(function, f"{key[1]}/", opset)
        for domain in read.opset_imports:  # a function of another opset has a rule of its own, and is inlined
            function.opset_imports.pop(domain, None)
    return read


def _mark(nodes: ir.Graph | ir.Function, path: str, opset: int) -> None:
    for node in nodes:
        first = next((output.name or "" for output in node.outputs), "")
        label = path + (node.name or f"{node.op_type} -> {first}")
        names = [(value.name or "") if value is not None else "" for value in node.inputs]
        node.meta.update({"label": label, "opset": opset, "inputs": names})
        for name, graph in _subgraphs(node):
            _mark(graph, f"{label}/{name}/", opset)


def _subgraphs(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from ((name, graph) for graph in attribute.as_graphs())


def _calls(model: ir.Model) -> Iterator[FunctionCall]:
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for nodes in bodies:
        for node in nodes.all_nodes():
            if node.op_identifier() in model.functions:
                given = tuple(value is not None for value in node.inputs)
                yield FunctionCall(str(node.meta["label"]), node.op_identifier(), given)


def _inline(model: ir.Model) -> ir.Model | None:
    """The model, changed in place; None if its functions cannot be inlined, which may leave it half changed."""
    sizes: dict[FunctionKey, float] = {}

    def size(nodes: ir.Graph | ir.Function, calls: tuple[FunctionKey, ...]) -> float:
        """Nodes after inlining; infinite if functions call themselves."""
        total = 0.0
        for node in nodes.all_nodes():
            key = node.op_identifier()
            if key in model.functions:
                if key in calls or len(calls) > MAX_DEPTH:
                    return math.inf
                if key not in sizes:
                    sizes[key] = size(model.functions[key], (*calls, key))
                total += sizes[key]
            total += 1
        return total

    if size(model.graph, ()) > MAX_NODES:
        return None
    try:
        InlinePass()(model)
    except (ValueError, RuntimeError):  # as for a call with more inputs than its function has
        return None
    return model


def _nodes(model: ir.Model, folder: Path | None) -> Iterator[GraphNode]:
    values = Values(overridable=(model.ir_version or 0) >= 4, read_external=folder is not None)
    for ir_node in model.graph.all_nodes():
        node = GraphNode(ir_node, tuple(values.of(value) for value in ir_node.inputs))
        values.add(node)
        yield node


def quantized_type(node: GraphNode) -> int:
    """The integer type that a QuantizeLinear writes: its zero point's, else `output_dtype`, else uint8."""
    if node.given(2):
        return node.value(2).dtype
    return node.integer("output_dtype", 0) or int(TensorProto.UINT8)
