"""What a compiled engine consists of, and in which precision it multiplies.

Both libraries name the ONNX nodes that they fused into a layer. TensorRT-RTX prints the layers at the end of a detailed
build log, TensorRT returns the same records as JSON from the engine inspector.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from tqdit.errors import BackendError

HEADING = "Layers:"  # of the list in the build log
# Kinds of layers that multiply matrices. A fused pointwise layer ("kgen") carries the names of products as well, whose
# output it scales; it multiplies only if it is an attention or a product of its own. TensorRT 10.x calls a product with
# what follows it a "fusion" (NVIDIA/TensorRT issue 4397), which only its tactic tells from a fused pointwise layer.
PRODUCTS = {"gemm", "correlation", "runtime_fusion", "matrixmultiply", "matrix_multiply", "fullyconnected"}
_PRODUCT_TACTIC = re.compile(r"gemm|conv|fprop|mha", re.IGNORECASE)
_INTEGER_TACTIC = re.compile(r"i8(?:[iuf]\d+)*_i8i32")  # such as sm80_xmma_gemm_i8f16_i8i32_f32_tn_n_tilesize64x64x64
EIGHT_BITS = {"Int8": re.compile("int8", re.IGNORECASE), "FP8": re.compile("fp8|float8|e4m3", re.IGNORECASE)}
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_TENSOR = re.compile(r"Dimensions: \[(?P<shape>[^\]]*)\].*?Datatype: (?P<type>\w+)")
_RECORD = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>[^,]*).*?Metadata: ?(?P<metadata>.*)$"
)


@dataclass(frozen=True)
class Layer:
    """One fused layer. Types are the library's words, such as Int8, Half, Float; those of single numbers, which are
    factors of a product (alpha and beta), are left out.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]  # types of what flows in
    constants: tuple[str, ...]  # types of what lies in the engine
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]  # ONNX nodes
    tactic: str = ""  # name of the kernel
    shapes: tuple[tuple[int, ...], ...] = ()  # of the outputs; -1 is free

    @property
    def multiplies(self) -> bool:
        kind, name = self.kind.lower(), self.name.lower()
        if kind == "fusion":
            return bool(_PRODUCT_TACTIC.search(self.tactic))
        return kind in PRODUCTS or kind.startswith("cask") or (kind == "kgen" and ("gemm" in name or "mha" in name))

    @property
    def is_integer(self) -> bool:
        return self.multiplies_in("Int8")

    def multiplies_in(self, kind: str) -> bool:
        """Whether both operands are Int8 (FP8): two inputs, or an input and its weights. Of Int8 the kernel's name may
        say so.

        A "runtime_fusion" is not counted by its operands: it also holds products whose integers it turns into floats
        first.
        """
        if not self.multiplies:
            return False
        if kind == "Int8" and _INTEGER_TACTIC.search(self.tactic):
            return True
        if self.kind.lower() == "runtime_fusion":
            return False
        if self.kind.lower() == "kgen" or (self.inputs == (kind,) and not self.constants):
            return set(self.inputs) == {kind}  # attention: q, k and v; or an inspector that lists no constants
        # 10.x lists weights and bias among the inputs
        return self.inputs[:1] == (kind,) and (*self.inputs, *self.constants).count(kind) >= 2


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
            str(layer.get("TacticName", "")),
            _shapes(layer.get("Outputs", ())),
        )
        for layer in layers
    )


def _from_line(line: str) -> Layer:
    match = _RECORD.match(line)
    if match is None:
        raise BackendError(f"a layer in the build log cannot be read: {line[:80]}. Report this version of the library.")
    inputs, constants, outputs = (
        [{"Dimensions": tensor["shape"].split(","), "Datatype": tensor["type"]}
         for tensor in _TENSOR.finditer(match[group])]
        for group in ("inputs", "constants", "outputs")
    )  # fmt: skip
    nodes = tuple(_NODE.findall(match["metadata"]))
    return Layer(match["name"], match["kind"], _types(inputs), _types(constants), _types(outputs), nodes,
                 match["tactic"], _shapes(outputs))  # fmt: skip


def _types(tensors: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(kind for kind, _ in _tensors(tensors))


def _shapes(tensors: Iterable[Mapping[str, Any]]) -> tuple[tuple[int, ...], ...]:
    return tuple(shape for _, shape in _tensors(tensors))


def _tensors(tensors: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """('Int8', shape) from {"Datatype": "Int8"} or from {"Format/Datatype": "Row major Int8 format"}."""
    for tensor in tensors:
        text = str(tensor.get("Datatype", tensor.get("Format/Datatype", "")))
        kind = next((word for word, pattern in EIGHT_BITS.items() if pattern.search(text)), text)
        if kind in EIGHT_BITS or not _is_scalar(tensor.get("Dimensions")):
            yield kind, tuple(int(size) for size in tensor.get("Dimensions") or () if str(size).strip("- ").isdigit())


def _is_scalar(dimensions: Any) -> bool:
    return isinstance(dimensions, list) and all(str(size).strip() in ("", "1") for size in dimensions)
