"""Local functions (FunctionProto): what keeps them from running, or from running right, once a backend inlines them.

1. A function calls a function. TensorRT-RTX 1.7 loses the attribute that the outer one passes on and computes 0.0.
2. A call leaves out an input.
3. A function has the name of a standard operator; TensorRT looks at the name only.
4. A function is written for another opset than the model.
5. Functions at all: OpenVINO has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
from onnx import AttributeProto, FunctionProto, NodeProto

from tqdit.lint.finding import TENSORRT, Finding
from tqdit.lint.program import STANDARD, Program, function_key

RULE = "function"
INLINE = "onnx.inliner.inline_local_functions(model)"


def check(program: Program) -> Iterator[Finding]:
    for function in program.functions.values():
        yield from _nested(program, function)
    yield from _calls(program)
    for function in program.functions.values():
        yield from _name(function)
        yield from _opset(program, function)
    yield from _any(program)


def _nested(program: Program, function: FunctionProto) -> Iterator[Finding]:
    for node in _all_nodes(function.node):
        if function_key(node) not in program.functions:
            continue
        passes_on = any(attribute.ref_attr_name for attribute in node.attribute)
        yield Finding(
            RULE,
            "error",
            f"function {_full_name(function)}",
            f"it calls the function {node.domain}.{node.op_type}"
            + (" and passes an attribute on to it. " if passes_on else ". ")
            + "TensorRT-RTX parses nested functions and silently computes 0.0 if an attribute is passed on.",
            f"Write the inner function's nodes into the outer one, or inline: {INLINE}.",
            TENSORRT,
        )


def _calls(program: Program) -> Iterator[Finding]:
    for call in program.calls:
        function = program.functions[call.key]
        given = (*call.given, *[False] * len(function.input))
        left_out = [name for name, here in zip(function.input, given, strict=False) if not here]
        if left_out:
            yield Finding(
                RULE,
                "error",
                call.label,
                f"it calls {_full_name(function)} without its input '{left_out[0]}'. TensorRT refuses the file: "
                "'Invalid Node'.",
                "Pass every input of a function; make two functions if one input is optional.",
                TENSORRT,
            )


def _name(function: FunctionProto) -> Iterator[Finding]:
    if onnx.defs.has(function.name):
        yield Finding(
            RULE,
            "error",
            f"function {_full_name(function)}",
            f"it has the name of the standard operator {function.name}. TensorRT's parser looks at the name without "
            "the domain and runs the standard operator instead.",
            "Give it a name that no ONNX operator has.",
            TENSORRT,
        )


def _opset(program: Program, function: FunctionProto) -> Iterator[Finding]:
    versions = {entry.domain: entry.version for entry in program.model.opset_import}
    for entry in function.opset_import:
        outer = program.opset if entry.domain in STANDARD else versions.get(entry.domain)
        if outer is not None and outer != entry.version:
            yield Finding(
                RULE,
                "warning",
                f"function {_full_name(function)}",
                f"it is written for version {entry.version} of '{entry.domain or 'ai.onnx'}', the model for {outer}. "
                "What its operators mean then depends on whether a backend converts them when it inlines.",
                f"Write function and model for one opset ({outer}).",
            )


def _any(program: Program) -> Iterator[Finding]:
    names = sorted({_full_name(program.functions[call.key]) for call in program.calls})
    if names:
        yield Finding(
            RULE,
            "warning",
            program.calls[0].label,
            f"the file calls functions ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}). OpenVINO refuses "
            "it: 'No conversion rule found'.",
            f"None for tqdit-build, which inlines them. For other tools inline them first: {INLINE}.",
            ("openvino",),
        )


def _full_name(function: FunctionProto) -> str:
    return f"{function.domain}.{function.name}"


def _all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes of a body and of the subgraphs in it."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                yield from _all_nodes(graph.node)
