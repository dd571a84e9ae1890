"""Local functions (FunctionProto): what keeps them from running, or from running right, once a backend inlines them.

1. A function calls a function. TensorRT-RTX 1.7 loses the attribute that the outer one passes on and computes 0.0.
2. A call leaves out an input.
3. A function has the name of a standard operator; TensorRT looks at the name only.
4. A function is written for another opset than the model.
5. Functions at all: OpenVINO has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

import onnx
import onnx_ir as ir

from tqdit.lint.finding import TENSORRT, Finding, Rule
from tqdit.lint.program import STANDARD, Program, label_of

RULE = Rule("function")
INLINE = "onnx.inliner.inline_local_functions(model)"


def check(program: Program) -> Iterator[Finding]:
    functions = program.file.functions
    for function in functions.values():
        yield from _nested(program, function)
    bodies: list[ir.Graph | ir.Function] = [program.file.graph, *functions.values()]
    calls = [node for body in bodies for node in body.all_nodes() if node.op_identifier() in functions]
    for call in calls:
        yield from _call(call, functions[call.op_identifier()])
    for function in functions.values():
        yield from _name(function)
        yield from _opset(program, function)
    if calls:
        yield _any(calls)


def _nested(program: Program, function: ir.Function) -> Iterator[Finding]:
    for node in function.all_nodes():
        if node.op_identifier() not in program.file.functions:
            continue
        passes_on = any(attribute.is_ref() for attribute in node.attributes.values())
        yield RULE.error(
            f"function {_full_name(function)}",
            f"it calls the function {_full_name(node)}"
            + (" and passes an attribute on to it. " if passes_on else ". ")
            + "TensorRT-RTX parses nested functions and silently computes 0.0 if an attribute is passed on.",
            f"Write the inner function's nodes into the outer one, or inline: {INLINE}.",
            TENSORRT,
        )


def _call(call: ir.Node, function: ir.Function) -> Iterator[Finding]:
    given = zip_longest(function.inputs, call.inputs[: len(function.inputs)])
    left_out = [needed.name for needed, value in given if value is None]
    if left_out:
        yield RULE.error(
            label_of(call),
            f"it calls {_full_name(function)} without its input '{left_out[0]}'. TensorRT refuses the file: "
            "'Invalid Node'.",
            "Pass every input of a function; make two functions if one input is optional.",
            TENSORRT,
        )


def _name(function: ir.Function) -> Iterator[Finding]:
    if onnx.defs.has(function.name):
        yield RULE.error(
            f"function {_full_name(function)}",
            f"it has the name of the standard operator {function.name}. TensorRT's parser looks at the name without "
            "the domain and runs the standard operator instead.",
            "Give it a name that no ONNX operator has.",
            TENSORRT,
        )


def _opset(program: Program, function: ir.Function) -> Iterator[Finding]:
    for domain, version in function.opset_imports.items():
        outer = program.opset if domain in STANDARD else program.file.opset_imports.get(domain)
        if outer is not None and outer != version:
            yield RULE.warning(
                f"function {_full_name(function)}",
                f"it is written for version {version} of '{domain or 'ai.onnx'}', the model for {outer}. "
                "What its operators mean then depends on whether a backend converts them when it inlines.",
                f"Write function and model for one opset ({outer}).",
            )


def _any(calls: list[ir.Node]) -> Finding:
    names = sorted({_full_name(call) for call in calls})
    return RULE.warning(
        label_of(calls[0]),
        f"the file calls functions ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}). OpenVINO refuses "
        "it: 'No conversion rule found'.",
        f"None for tqdit-build, which inlines them. For other tools inline them first: {INLINE}.",
        ("openvino",),
    )


def _full_name(entry: ir.Function | ir.Node) -> str:
    return f"{entry.domain}.{entry.op_type if isinstance(entry, ir.Node) else entry.name}"
