"""Which module of the network a node belongs to: the trace keeps module scopes in the nodes' metadata."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import onnx_ir as ir

from tqdit.errors import UsageError
from tqdit.graph_names import SCOPE_KEY
from tqdit.ports import Port

SCOPES_KEY = "pkg.torch.onnx.name_scopes"  # written by torch's exporter
NETWORK = "network"  # name of the network inside what is traced
TIMESTEPS = "timesteps"  # name of the sampling step's table of them


def scope_of(node: ir.Node) -> str:
    """Name of a node's innermost module in the network's module tree; '' outside the network."""
    own = node.metadata_props.get(SCOPE_KEY)
    if own is not None:
        return own
    text = node.metadata_props.get(SCOPES_KEY)
    if text is None:
        return ""
    scopes = ast.literal_eval(text)
    innermost: str = scopes[-2] if len(scopes) > 1 else ""
    return innermost.removeprefix(NETWORK).removeprefix(".")


def is_in_network(node: ir.Node) -> bool:
    """Whether a node of a step graph belongs to the network, and not to the sampling step around it."""
    text = node.metadata_props.get(SCOPES_KEY)
    return text is not None and NETWORK in ast.literal_eval(text)


class Modules:
    """The nodes of a graph by the module that they belong to."""

    def __init__(self, model: ir.Model) -> None:
        self._nodes: dict[str, list[ir.Node]] = {}
        for node in model.graph:
            self._nodes.setdefault(scope_of(node), []).append(node)

    def all(self, module: str, *op_types: str) -> list[ir.Node]:
        """The nodes of these types in a module, one for each of its calls. Refuses a trace without any.

        The exporter merges calls that are equal: a module that is called twice may have one node.
        """
        found = [node for node in self._nodes.get(module, []) if node.op_type in op_types]
        if not found:
            raise UsageError(
                f"the trace of '{module}' has no node of type {' or '.join(op_types)}, expected one for each call. "
                "This model cannot be exported with quantized sites there; leave them out of the calibration."
            )
        return found


def network_timestep(model: ir.Model, time: Port) -> ir.Value:
    """The value that tells the network the timestep of each of its rows. time: the network's port for it.

    In a denoiser graph an input; in a step graph what the step hands to the network, which with guidance has two rows
    per image.
    """
    if TIMESTEPS not in model.graph.initializers:
        return next(value for value in model.graph.inputs if value.name == time.name)
    dtype = ir.DataType.INT64 if time.dtype == "int64" else ir.DataType.FLOAT
    entering = {
        id(value): value
        for node in model.graph
        if is_in_network(node)
        for value in node.inputs
        if value is not None and value.dtype == dtype and _is_made_around_network(value)
    }
    found = [value for value in entering.values() if TIMESTEPS in _ancestor_names(value)]
    if len(found) != 1:
        raise UsageError(f"the trace hands {len(found)} timestep values to the network, expected 1. Report this model.")
    return found[0]


def _is_made_around_network(value: ir.Value) -> bool:
    """Made by a node of the sampling step. Nodes without scopes are the tracer's own and may be anywhere."""
    node = value.producer()
    return node is not None and SCOPES_KEY in node.metadata_props and not is_in_network(node)


def _ancestor_names(value: ir.Value) -> Iterator[str]:
    """Names of the inputs and initializers that a value depends on."""
    stack, seen = [value], set()
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        node = current.producer()
        if node is None:
            yield current.name or ""
        else:
            stack += [each for each in node.inputs if each is not None]
