"""A model as the rules see it: every node once for each way it is reached, with what is known about its inputs.

Calls of functions are followed as a backend would inline them, so a scale that a function takes as an input or as an
attribute is judged by what each call passes. Subgraphs see the values around them. Weights are never read.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from tqdit.lint.folding import Attributes, constant_node, fold, from_tensor
from tqdit.lint.types import STANDARD, output_type
from tqdit.lint.values import UNKNOWN, Quantized, Value

MAX_SITES = 100_000  # functions that call functions twice, thirty deep, would be more; such calls stay unopened,
MAX_DEPTH = 50  # and so do these
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial",
           "Dropout"}  # fmt: skip
_SCOPES = "pkg.torch.onnx.name_scopes"

FunctionKey = tuple[str, str, str]
Values = MutableMapping[str, Value]


@dataclass(frozen=True)
class Site:
    """One node. `label` names it for people; `scope` is the torch module that it was traced from, '' where unknown."""

    node: NodeProto
    label: str
    scope: str
    opset: int
    attributes: Attributes
    inputs: tuple[Value, ...]

    @property
    def op_type(self) -> str:
        return str(self.node.op_type)

    @property
    def standard(self) -> bool:
        return self.node.domain in STANDARD

    def given(self, index: int) -> bool:
        """Whether the node has its input number `index`."""
        return len(self.node.input) > index and bool(self.node.input[index])

    def value(self, index: int) -> Value:
        return self.inputs[index] if index < len(self.inputs) else UNKNOWN

    def integer(self, name: str, default: int) -> int:
        return int(self.attributes[name].i) if name in self.attributes else default


@dataclass(frozen=True)
class Program:
    model: ModelProto
    sites: tuple[Site, ...]
    opset: int
    functions: Mapping[FunctionKey, FunctionProto]

    def standard_sites(self, *op_types: str) -> Iterator[Site]:
        """The nodes of these standard operators, in order."""
        return (site for site in self.sites if site.op_type in op_types and site.standard)


def read_program(model: ModelProto, folder: Path | None = None) -> Program:
    """`folder` is where external data lies; small constants are read from there."""
    functions = {(function.domain, function.name, function.overload): function for function in model.functions}
    walk = _Walk(functions, folder, overridable=model.ir_version >= 4)
    opset = standard_opset(model.opset_import)
    walk.graph(model.graph, _Place(opset=opset), {})
    return Program(model, tuple(walk.sites), opset, functions)


def standard_opset(imports: Iterable[onnx.OperatorSetIdProto]) -> int:
    """The version of ONNX's own operators; 1 where none is named, as the specification has it."""
    return next((int(entry.version) for entry in imports if entry.domain in STANDARD), 1)


def function_key(node: NodeProto) -> FunctionKey:
    return (node.domain, node.op_type, node.overload)


@dataclass(frozen=True)
class _Place:
    """Where a body stands: the names that lead to it, what its attribute references mean, the calls around it."""

    opset: int
    path: str = ""
    references: Attributes = field(default_factory=dict)
    calls: tuple[FunctionKey, ...] = ()


@dataclass
class _Walk:
    functions: Mapping[FunctionKey, FunctionProto]
    folder: Path | None
    overridable: bool  # since IR 4 an initializer that is also an input is only a default
    sites: list[Site] = field(default_factory=list)

    def graph(self, graph: GraphProto, place: _Place, outside: Values) -> None:
        values: Values = ChainMap({}, outside)
        inputs = {value.name for value in graph.input}
        for tensor in graph.initializer:
            constant = not (self.overridable and tensor.name in inputs)
            values[tensor.name] = replace(from_tensor(tensor, self.folder), constant=constant)
        for sparse in graph.sparse_initializer:
            values[sparse.values.name] = Value(True, sparse.values.data_type, tuple(sparse.dims))
        declared = _declared([*graph.input, *graph.value_info, *graph.output])
        for value in graph.input:
            if self.overridable or value.name not in values:
                values[value.name] = Value(dtype=declared.get(value.name, 0))
        self.body(graph.node, place, values, declared)

    def body(self, nodes: Sequence[NodeProto], place: _Place, values: Values, declared: Mapping[str, int]) -> None:
        for node in nodes:
            site = _site(node, place, values)
            self.sites.append(site)
            for attribute in site.attributes.values():
                for graph in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                    inner = replace(place, path=f"{site.label}/{attribute.name}/")
                    self.graph(graph, inner, values)
            for name, value in zip(node.output, self.outputs(site, place), strict=True):
                if name:
                    values[name] = value if value.dtype else replace(value, dtype=declared.get(name, 0))

    def outputs(self, site: Site, place: _Place) -> list[Value]:
        key, count = function_key(site.node), len(site.node.output)
        if key in self.functions:
            if key in place.calls or len(place.calls) > MAX_DEPTH or len(self.sites) > MAX_SITES:
                return [UNKNOWN] * count
            results = self.call(self.functions[key], site, replace(place, calls=(*place.calls, key)))
            return (results + [UNKNOWN] * count)[:count]
        if not site.standard:
            return [UNKNOWN] * count
        return [_output(site, index, self.folder) for index in range(count)]

    def call(self, function: FunctionProto, site: Site, place: _Place) -> list[Value]:
        """The values of a function's outputs; its nodes join the sites under the function's name."""
        defaults = {attribute.name: attribute for attribute in function.attribute_proto}
        inner = replace(
            place,
            opset=standard_opset(function.opset_import),
            path=f"{function.name}/",
            references={**defaults, **site.attributes},
        )
        values: Values = dict(zip(function.input, site.inputs, strict=False))
        self.body(function.node, inner, values, _declared(function.value_info))
        return [values.get(name, UNKNOWN) for name in function.output]


def _site(node: NodeProto, place: _Place, values: Values) -> Site:
    attributes = {}
    for attribute in node.attribute:
        resolved = place.references.get(attribute.ref_attr_name) if attribute.ref_attr_name else attribute
        if resolved is not None:
            attributes[attribute.name] = resolved
    name = node.name or f"{node.op_type} -> {next(iter(node.output), '')}"
    inputs = tuple(values.get(source, UNKNOWN) for source in node.input)
    return Site(node, place.path + name, _scope(node), place.opset, attributes, inputs)


def _scope(node: NodeProto) -> str:
    """The module path that PyTorch's exporter notes: a list in Python's spelling whose last entry is the node."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            names = [name.strip(" '\"") for name in entry.value.strip("[]").split(",")]
            return names[-2] if len(names) > 1 else ""
    return ""


def _declared(values: Iterable[onnx.ValueInfoProto]) -> dict[str, int]:
    return {value.name: value.type.tensor_type.elem_type for value in values if value.type.HasField("tensor_type")}


def _output(site: Site, index: int, folder: Path | None) -> Value:
    """One output of a standard operator."""
    if site.op_type == "Constant":
        return constant_node(site.attributes, folder)
    if site.op_type == "QuantizeLinear":
        source = site.value(0)
        return Value(
            source.constant and site.value(1).constant, quantized_type(site), source.shape, None, source.origin
        )
    if site.op_type == "DequantizeLinear":
        return _dequantized(site)
    given = [value for value, name in zip(site.inputs, site.node.input, strict=True) if name]
    opens = any(
        attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for attribute in site.attributes.values()
    )
    constant = all(value.constant for value in given) and site.op_type not in _RANDOM and not opens
    if site.op_type == "Cast":
        dtype = site.integer("to", TensorProto.UNDEFINED)
    elif site.op_type == "ConstantOfShape":
        dtype = site.attributes["value"].t.data_type if "value" in site.attributes else int(TensorProto.FLOAT)
    else:
        dtype = output_type(site.op_type, site.opset, site.inputs, index)
    return fold(site.op_type, site.attributes, site.inputs, Value(constant, dtype))


def quantized_type(site: Site) -> int:
    """The integer type that a QuantizeLinear writes: its zero point's, else `output_dtype`, else uint8."""
    if site.given(2):
        return site.value(2).dtype
    return site.integer("output_dtype", 0) or int(TensorProto.UINT8)


def _dequantized(site: Site) -> Value:
    data, scale = site.value(0), site.value(1)
    axis = site.integer("axis", 1)
    if axis < 0 and data.shape is not None:
        axis += len(data.shape)
    one_axis = scale.shape is not None and len(scale.shape) == 1 and scale.shape[0] > 1
    quantized = Quantized(site.label, data, scale, axis if one_axis else None)
    dtype = site.integer("output_dtype", 0) or scale.dtype
    return Value(data.constant and scale.constant, dtype, data.shape, None, data.origin, quantized)
