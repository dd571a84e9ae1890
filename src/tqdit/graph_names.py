"""Which module of the network a node of an exported graph belongs to: its scope.

The export writes the scope into the metadata of each node. Nobody reads it from the node's name. What a backend
compiled has names alone; `Scopes` looks them up among the nodes of the ONNX file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SCOPE_KEY = "tqdit.scope"  # in a node's metadata_props


def scope_of(node: Any) -> str:
    """Name of the module of a node of onnx or onnx_ir; '' outside the network."""
    metadata = node.metadata_props
    if hasattr(metadata, "get"):  # onnx_ir
        return str(metadata.get(SCOPE_KEY, ""))
    return next((entry.value for entry in metadata if entry.key == SCOPE_KEY), "")


class Scopes:
    """The scopes of the nodes of an onnx graph, by the names of nodes and values.

    Compilers name the last node after the graph's output.
    """

    def __init__(self, nodes: Iterable[Any]) -> None:
        self._scopes = {
            name: scope for node in nodes if (scope := scope_of(node)) for name in (*node.output, node.name)
        }

    def __bool__(self) -> bool:
        return bool(self._scopes)

    def scope_of_name(self, name: str) -> str:
        """The scope of a compiled layer, '' if none. Compilers append '/...' to the name of a node that they fused."""
        while name not in self._scopes:
            name, slash, _ = name.rpartition("/")
            if not slash:
                return ""
        return self._scopes[name]
