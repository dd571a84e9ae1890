"""Passes over a traced program that make it acceptable to torch's ONNX exporter. None knows a family.

Each takes a `torch.export.ExportedProgram` and changes it in place; `prepare` may return another one.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

aten = torch.ops.aten
SMALL = 1e-7  # onnxscript takes x + c for x below 1e-8
RANDOM = (aten.rand.default, aten.randn.default, aten.bernoulli.p, aten.empty.memory_format)


def prepare(program: ExportedProgram) -> ExportedProgram:
    """All passes in their order."""
    if any(_is_mutable(node) for node in program.graph.nodes):
        program = program.run_decompositions({})  # which also writes operations in place as others
    drop_assertions(program)
    drop_idle_squeezes(program)
    drop_joined_splits(program)
    keep_epsilons(program)
    cast_bool_where(program)
    fold_constants(program)
    return program


def drop_assertions(program: ExportedProgram) -> None:
    """Assertions about metadata keep nodes alive that nothing else uses, complex rotary tables among them."""
    for node in _calls(program, aten._assert_tensor_metadata.default):
        program.graph.erase_node(node)
    _finish(program)


def drop_idle_squeezes(program: ExportedProgram) -> None:
    """torch's squeeze of an axis that is longer than one does nothing; ONNX's is an error (PixArt, LTX2)."""
    for node in _calls(program, aten.squeeze.dim, aten.squeeze.dims):
        x: Any = node.args[0]
        axes: Any = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
        shape = x.meta["val"].shape
        if all(isinstance(shape[axis], int) and shape[axis] != 1 for axis in axes):
            node.replace_all_uses_with(x)
            program.graph.erase_node(node)
    _finish(program)


def drop_joined_splits(program: ExportedProgram) -> None:
    """What is joined and split into the same parts again (Flux's single blocks, as `find_products` makes them)."""
    for node in _calls(program, aten.split_with_sizes.default):
        joined: Any = node.args[0]
        wanted: Any = node.args[1]
        if joined.target is not aten.cat.default:
            continue
        parts, axis = joined.args[0], (*joined.args[1:], 0)[0]
        ndim = joined.meta["val"].ndim
        sizes = [part.meta["val"].shape[axis] for part in parts]
        if sizes == list(wanted) and axis % ndim == (*node.args[2:], 0)[0] % ndim:
            for user in list(node.users):
                user.replace_all_uses_with(parts[user.args[1]])
    _finish(program)


def keep_epsilons(program: ExportedProgram) -> None:
    """x + 1e-15 becomes max(x, 1e-15): the ONNX optimizer's rule for x + 0 has a tolerance of 1e-8 (Sana)."""
    for node in _calls(program, aten.add.Tensor, aten.add.Scalar):
        if isinstance(node.args[1], float) and 0 < node.args[1] < SMALL and not node.kwargs:
            node.target = aten.clamp_min.default
    _finish(program)


def cast_bool_where(program: ExportedProgram) -> None:
    """ONNX Runtime has no Where of bool (HunyuanVideo's masked_fill of a mask): choose among integers instead."""
    for node in (*_calls(program, aten.where.self), *_calls(program, aten.masked_fill.Scalar)):
        if node.meta["val"].dtype != torch.bool:
            continue
        places = (1, 2) if node.target is aten.where.self else (0,)
        with program.graph.inserting_before(node):
            args = list(node.args)
            for place in places:
                args[place] = _cast(program.graph, args[place], torch.int64)
            chosen = program.graph.call_function(node.target, tuple(args))
            chosen.meta["val"] = node.meta["val"].to(torch.int64)
            back = _cast(program.graph, chosen, torch.bool)
        node.replace_all_uses_with(back)
        program.graph.erase_node(node)
    _finish(program)


def fold_constants(program: ExportedProgram) -> None:
    """Compute what depends on no input and no parameter: positions, rotary tables, masks made from shapes.

    ONNX has no complex numbers, which such tables are made of in many networks (Qwen-Image, Z-Image).
    """
    graph, signature = program.graph, program.graph_signature
    values: dict[fx.Node, Any] = {}
    known = {
        spec.arg.name: program.constants.get(spec.target or "", program.state_dict.get(spec.target or ""))
        for spec in signature.input_specs
        if spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    }
    for node in graph.nodes:
        if node.op == "placeholder" and isinstance(known.get(node.name), Tensor):
            values[node] = known[node.name]
        elif node.op == "call_function" and _is_pure(node) and all(each in values for each in node.all_input_nodes):
            values[node] = _evaluate(node, values)
    first_input = next(node for node in graph.nodes if node.op == "placeholder" and _is_user_input(node, signature))
    for node, value in values.items():
        users = [user for user in node.users if user not in values]
        if node.op != "call_function" or not users or not isinstance(value, Tensor):
            continue
        name = f"folded_{node.name}"
        with graph.inserting_before(first_input):
            placeholder = graph.placeholder(name)
        placeholder.meta["val"] = node.meta["val"]
        program._constants[name] = value.detach().clone().contiguous()
        place = next(i for i, spec in enumerate(signature.input_specs) if spec.kind == InputKind.USER_INPUT)
        spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(placeholder.name), name)
        signature.input_specs.insert(place, spec)
        for user in users:
            user.replace_input_with(node, placeholder)
    _finish(program)


def _is_pure(node: fx.Node) -> bool:
    if node.target is operator.getitem:  # of what an operation with several results made
        return True
    return hasattr(node.target, "_schema") and not _is_mutable(node) and node.target not in RANDOM


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args = fx.map_arg(node.args, lambda each: values[each])
    kwargs = fx.map_arg(node.kwargs, lambda each: values[each])
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_user_input(node: fx.Node, signature: Any) -> bool:
    return node.name in signature.user_inputs


def _calls(program: ExportedProgram, *targets: Any) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function" and node.target in targets]


def _cast(graph: fx.Graph, value: Any, dtype: torch.dtype) -> fx.Node:
    node = graph.call_function(aten._to_copy.default, (value,), {"dtype": dtype})
    node.meta["val"] = value.meta["val"].to(dtype)
    return node


def _finish(program: ExportedProgram) -> None:
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
