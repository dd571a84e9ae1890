"""Opsets: what a file may be written for, by what it uses and by who reads it.

1. A standard operator that its opset does not have.
2. Per-channel scales below opset 13.
3. float16 scales below opset 19.
4. Outside what a backend takes.
5. Below 20, the opset that TQDiT writes and measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import onnx
import onnx_ir as ir

from tqdit.lint.finding import Finding, Rule, Severity
from tqdit.lint.program import GraphNode, Program
from tqdit.lint.values import per_channel

RULE = Rule("opset")
PER_CHANNEL = 13  # ONNX's changelog: QuantizeLinear-13 brought `axis`; TensorRT-RTX fails on such scales at opset 10
FLOAT16_SCALES = 19  # ONNX's changelog: QuantizeLinear-19 brought float16; the checker and ONNX Runtime refuse below
TQDIT = 20  # Gelu-20; the function bodies of domain `tqdit` are written in it


@dataclass(frozen=True)
class Limit:
    """Opsets that a backend is known to take.

    `severity` is error if it refuses the others, and warning if the others were not tried.
    """

    lowest: int
    highest: int
    severity: Severity
    source: str


LIMITS = {
    "onnxruntime": Limit(7, 26, "error", "ONNX Runtime 1.31 refuses to load newer ones"),
    "tensorrt-rtx": Limit(13, 25, "warning", "TensorRT-RTX 1.7 was seen to build 13..25"),
    "tensorrt": Limit(13, 25, "warning", "it shares the parser of TensorRT-RTX, which was seen to build 13..25"),
    # openvino: 2026.4 converts by operator; files of opset 28 load.
}


def check(program: Program) -> Iterator[Finding]:
    for node in program.nodes:
        if node.standard:
            yield from _missing(node)
        if node.standard and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from _scales(node)
    yield from _limits(program)


def _missing(node: GraphNode) -> Iterator[Finding]:
    if onnx.defs.has(node.op_type, node.opset, "") or not onnx.defs.has(node.op_type):
        return
    since = next(opset for opset in count(node.opset) if onnx.defs.has(node.op_type, opset, ""))
    yield RULE.error(
        node.label,
        f"{node.op_type} exists from opset {since} on, the file is written for {node.opset}. No backend has to "
        "take it.",
        f"Export with opset {max(since, TQDIT)}.",
    )


def _scales(node: GraphNode) -> Iterator[Finding]:
    scale = node.value(1)
    needs = (
        (PER_CHANNEL, per_channel(scale), "per-channel scales"),
        (FLOAT16_SCALES, scale.dtype == ir.DataType.FLOAT16, "float16 scales"),
    )
    for lowest, found, what in needs:
        if found and node.opset < lowest:
            yield RULE.error(
                node.label,
                f"it has {what}, which exist from opset {lowest} on; the file is written for {node.opset}. ONNX's "
                "checker and ONNX Runtime refuse it.",
                f"Export with opset {TQDIT}.",
            )


def _limits(program: Program) -> Iterator[Finding]:
    first = next((node.label for node in program.nodes if node.standard), "the graph")
    for backend, limit in LIMITS.items():
        if not limit.lowest <= program.opset <= limit.highest:
            yield Finding(
                RULE.name,
                limit.severity,
                first,
                f"the file is written for opset {program.opset}, {backend} takes {limit.lowest}..{limit.highest} "
                f"({limit.source}).",
                f"Export with opset {TQDIT}, or convert: onnx.version_converter.convert_version(model, {TQDIT}).",
                (backend,),
            )
    if program.opset < TQDIT and any(node.standard for node in program.nodes):
        yield RULE.warning(
            first,
            f"the file is written for opset {program.opset}. Below {TQDIT} there is no Gelu, so it is a chain of nodes "
            "that not every backend recognises, and the function bodies of domain 'tqdit' are not defined.",
            f"Export with opset {TQDIT}.",
        )
