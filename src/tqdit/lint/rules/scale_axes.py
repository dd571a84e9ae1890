"""Where several scales may stand: on the output channels of weights, nowhere else.

1. A per-channel weight scale that does not lie on the product's output channels.
2. As many scales as the axis does not have.
3. Per-channel or per-row scales on an activation.
4. Blocked scales on an activation.
"""

from __future__ import annotations

from collections.abc import Iterator

from tqdit.lint.finding import TENSORRT, Finding, Rule
from tqdit.lint.program import GraphNode, Program
from tqdit.lint.rules.products import operands, output_channel
from tqdit.lint.values import Quantized, Value, blocked, per_channel

RULE = Rule("scale-axis")


def check(program: Program) -> Iterator[Finding]:
    for node in program.nodes:
        if node.standard and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from _count(node)
            yield from _activation(node)
        for index, value in enumerate(operands(node)):
            if value.quantized is not None and value.constant:
                yield from _weight(node, index, value, value.quantized)


def _weight(node: GraphNode, index: int, value: Value, quantized: Quantized) -> Iterator[Finding]:
    if quantized.axis is None or value.shape is None or len(value.shape) < 2:
        return
    wanted = output_channel(node, index, len(value.shape))
    if quantized.axis != wanted:
        yield RULE.error(
            quantized.node,
            f"its scales lie on axis {quantized.axis} of the weight as {node.label} takes it, the output channels on "
            f"axis {wanted}. No integer product can apply them afterwards: TensorRT runs it in float silently, "
            "OpenVINO and ONNX Runtime's optimiser give wrong values.",
            "Give one scale per output channel: axis 1 for MatMul, axis 0 for Gemm with transB=1 and for Conv.",
        )


def _count(node: GraphNode) -> Iterator[Finding]:
    data, scale = node.value(0), node.value(1)
    if data.shape is None or scale.shape is None or not per_channel(scale):
        return
    axis = node.integer("axis", 1)
    have = data.shape[axis] if -len(data.shape) <= axis < len(data.shape) else None
    if have != scale.shape[0]:
        yield RULE.error(
            node.label,
            f"it has {scale.shape[0]} scales for axis {axis}, "
            + (f"which has {have} entries." if have is not None else f"which a tensor of shape {data.shape} lacks.")
            + " Every backend refuses this.",
            "Set the axis to the one that the scales were made for.",
        )


def _activation(node: GraphNode) -> Iterator[Finding]:
    data, scale = node.value(0), node.value(1)
    if data.constant or not scale.constant:  # a scale at run time has a rule of its own
        return
    remedy = (
        "Use one scale for the tensor and divide by the ratios before: x / r -> QuantizeLinear/DequantizeLinear -> "
        "MatMul, with r per row multiplied back after it, or r per channel multiplied into the weight."
    )
    if per_channel(scale):
        yield RULE.error(
            node.label,
            f"it has {scale.size} scales for an activation. Scales along the summed axis cannot be taken out of an "
            "integer product: TensorRT and ONNX Runtime run it in float silently.",
            remedy,
            ("onnxruntime", *TENSORRT),
        )
    elif blocked(scale):
        yield RULE.error(
            node.label,
            f"it has a scale of shape {scale.shape} (blocks or tokens) for an activation. TensorRT "
            "and ONNX Runtime run the product in float silently.",
            remedy,
            ("onnxruntime", *TENSORRT),
        )
