"""What a compiled engine consists of, and in which precision it multiplies.

Both libraries name the ONNX nodes that they fused into a layer. TensorRT-RTX prints the layers at the end of a detailed
build log, TensorRT returns the same records as JSON from the engine inspector.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from tqdit.errors import BackendError

HEADING = "Layers:"  # of the list in the build log
# Kinds of layers that multiply matrices. A fused pointwise layer ("kgen") carries the names of products as well, whose
# output it scales; it multiplies only if it is an attention or a product of its own.
PRODUCTS = {"gemm", "correlation", "runtime_fusion", "matrixmultiply", "matrix_multiply", "fullyconnected"}
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_TYPE = re.compile(r"Datatype: (\w+)")
_RECORD = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: .*?Metadata: ?(?P<metadata>.*)$"
)


@dataclass(frozen=True)
class Layer:
    """One fused layer. Types are the library's words, such as Int8, Half, Float."""

    name: str
    kind: str
    inputs: tuple[str, ...]  # types of what flows in
    constants: tuple[str, ...]  # types of what lies in the engine
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]  # ONNX nodes

    @property
    def multiplies(self) -> bool:
        kind, name = self.kind.lower(), self.name.lower()
        return kind in PRODUCTS or kind.startswith("cask") or (kind == "kgen" and ("gemm" in name or "mha" in name))

    @property
    def is_integer(self) -> bool:
        """Both operands are Int8: two inputs, or an input and its weights.

        A "runtime_fusion" is never counted: it also holds products whose integers it turns into floats first.
        """
        if not self.multiplies or self.kind.lower() == "runtime_fusion":
            return False
        # attention: all of q, k, v (and none in float); without constants: an inspector that does not list them
        if self.kind.lower() == "kgen" or not self.constants:
            return set(self.inputs) == {"Int8"}
        return bool(self.inputs) and self.inputs[0] == "Int8" and (*self.inputs, *self.constants).count("Int8") >= 2


def from_log(messages: Iterable[str]) -> tuple[Layer, ...]:
    """The layers in a build log of detailed verbosity, one message each entry."""
    listed = [message for message in messages if message.startswith(HEADING)]
    if not listed:
        raise BackendError("the build log lists no layers, so nothing proves what runs in INT8. Report this version.")
    # not splitlines, which also splits at the record separators between the names of nodes
    lines = takewhile(lambda line: line.startswith("Name: "), listed[-1].split("\n")[1:])
    return tuple(_from_line(line) for line in lines)


def from_inspector(report: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The layers in the engine inspector's JSON."""
    layers = report.get("Layers")
    if not layers or not all(isinstance(layer, dict) for layer in layers):  # names alone: built without details
        raise BackendError("the engine inspector shows no details of its layers, so nothing proves what runs in INT8.")
    return tuple(
        Layer(
            str(layer.get("Name", "")),
            str(layer.get("LayerType", "")),
            _types(layer.get("Inputs", ())),
            _types(layer.get("Constants", ())),
            _types(layer.get("Outputs", ())),
            tuple(_NODE.findall(str(layer.get("Metadata", "")))),
        )
        for layer in layers
    )


def _from_line(line: str) -> Layer:
    match = _RECORD.match(line)
    if match is None:
        raise BackendError(f"a layer in the build log cannot be read: {line[:80]}. Report this version of the library.")
    inputs, constants, outputs = (tuple(_TYPE.findall(match[group])) for group in ("inputs", "constants", "outputs"))
    return Layer(match["name"], match["kind"], inputs, constants, outputs, tuple(_NODE.findall(match["metadata"])))


def _types(tensors: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """'Int8' from {"Datatype": "Int8"} or from {"Format/Datatype": "Row major Int8 format"}."""
    texts = (str(tensor.get("Datatype", tensor.get("Format/Datatype", ""))) for tensor in tensors)
    return tuple("Int8" if "int8" in text.lower() else text for text in texts)
