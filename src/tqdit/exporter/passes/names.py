"""The one place that names what is in a graph: by the module tree, so that a viewer reads like the model."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from tqdit.exporter.passes.scopes import NETWORK, is_in_network, scope_of
from tqdit.graph_names import SCOPE_KEY


def name_by_modules(model: ir.Model) -> None:
    """Requires: scopes in the nodes' metadata.

    Ensures: nodes are named SCOPE/OpType, values after the node that makes them, parameters as in the module tree. The
    scope of a node is its only metadata (`tqdit.graph_names`); the tracer's own, which holds source lines of the
    exporting machine, is gone. Inputs and outputs of the graph keep their names. Two runs give the same names.
    """
    graph = model.graph
    outputs = {id(value) for value in graph.outputs}
    seen: Counter[str] = Counter()
    scopes: list[str] = []
    for node in graph:
        scope = scope_of(node) or (NETWORK if is_in_network(node) else "")
        scopes.append(scope)
        name = _unique(f"{scope or 'graph'}/{node.op_type}", seen)
        node.name = name
        for index, value in enumerate(node.outputs):
            if id(value) not in outputs:
                value.name = f"{name}:{index}"
    for value in list(graph.initializers.values()):
        value.name = _unique(_initializer_name(value), seen)
    forget_sources(model)
    for node, scope in zip(graph, scopes, strict=True):
        if scope:
            node.metadata_props[SCOPE_KEY] = scope


def forget_sources(model: ir.Model) -> None:
    """Ensures: no metadata, of which the tracer's holds source lines of the exporting machine."""
    graph = model.graph
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
    for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
        value.metadata_props.clear()


def _initializer_name(value: ir.Value) -> str:
    """A parameter's name in the network; what the tracer made is named after its only user, or as a constant."""
    assert value.name is not None
    if value.name.startswith(f"{NETWORK}."):
        return value.name.removeprefix(f"{NETWORK}.")
    if "." in value.name or not value.name.startswith("val_"):
        return value.name
    scopes = {scope_of(node) for node, _ in value.uses()}
    if len(scopes) == 1 and (scope := scopes.pop()):
        weight = value.shape is not None and len(value.shape) == 2
        return f"{scope}.{'weight_transposed' if weight else 'constant'}"
    return "constant"


def _unique(name: str, seen: Counter[str]) -> str:
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}_{seen[name]}"
