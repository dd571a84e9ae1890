"""Torch module to ONNX graph: the float trace on which the passes work."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes

from tqdit.errors import UsageError
from tqdit.exporter.lazy import read_from
from tqdit.exporter.optimize import optimize
from tqdit.exporter.program import prepare
from tqdit.exporter.watch import UntraceableError, Watch
from tqdit.models.scratch import need_compiler, need_temporary_folder
from tqdit.models.weights import IN_MEMORY, Weights
from tqdit.ports import Signature

OPSETS = range(20, 24)  # 20 is the first with Gelu; 23 the last that torch's exporter writes
EXAMPLE_BATCH = 3  # a size that no other dimension is derived from, so the exporter cannot mistake it for a constant


def trace(
    module: nn.Module, inputs: Mapping[str, Tensor], output: str | list[str], opset: int = OPSETS.start,
    rows: int | None = None, weights: Weights = IN_MEMORY,
) -> ir.Model:  # fmt: skip
    """Trace a module into an ONNX graph whose first dimension of every input is the free `batch`, or `rows`.

    `inputs` names the graph's inputs, each with an example of batch 3; the module's `forward(*inputs)` takes them in
    this order. weights: where the values of its parameters lie. Module scopes are kept in the nodes' metadata. Raises
    UntraceableError if PyTorch refuses.
    """
    check_opset(opset)
    need_compiler()
    need_temporary_folder()
    batch = torch.export.Dim("batch", min=1, max=65536)
    shapes = (tuple({0: batch} for _ in inputs),) if rows is None else None
    watch = Watch(module)
    with _quiet(), _without_autocast():
        with watch.check("torch.export"):
            traced = _program(module.eval(), tuple(tensor[:rows] for tensor in inputs.values()), shapes)
        with watch.check("a pass before torch.onnx"):
            prepared = prepare(traced)
        with watch.check("torch.onnx"):
            program = torch.onnx.export(
                prepared,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                verbose=False,
                optimize=False,
            )
            assert program is not None
            read_from(weights, program.model.graph)
            optimize(program.model)
    graph = program.model.graph
    names = [*inputs, *([output] if isinstance(output, str) else output)]
    for value, name in zip((*graph.inputs, *graph.outputs), names, strict=True):
        value.name = name
    return program.model


def trace_any_rows(
    module: nn.Module, inputs: Mapping[str, Tensor], output: str | list[str], opset: int, weights: Weights = IN_MEMORY
) -> ir.Model:
    """As `trace`: with a free batch if the network can, else with one row (`fixed_rows` of the graph).

    Networks that make lists of their rows, or look at each in Python, cannot. Raises UsageError if neither works.
    """
    try:
        return trace(module, inputs, output, opset, weights=weights)
    except UntraceableError:
        try:
            return trace(module, inputs, output, opset, 1, weights)
        except UntraceableError as error:
            raise UsageError(f"PyTorch cannot trace this network: {error}. No engine can be made.") from error


def fixed_rows(graph: ir.Model) -> int | None:
    """How many rows each call of a graph has; None: any."""
    shape = graph.graph.inputs[0].shape
    return shape[0] if shape is not None and isinstance(shape[0], int) else None


def _program(module: nn.Module, inputs: tuple[Tensor, ...], shapes: Any) -> torch.export.ExportedProgram:
    """The traced module. A bound on the batch that a kernel's choice of memory layout suggests is taken for the trace
    alone, as torch's ONNX exporter does: no node of the graph knows it.
    """
    try:
        return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except torch._dynamo.exc.UserError as error:
        bounded: Any = None
        with contextlib.suppress(torch._dynamo.exc.UserError):  # it suggests nothing
            bounded = None if shapes is None else refine_dynamic_shapes_from_suggested_fixes(error.msg, shapes)
        if bounded is None or isinstance(bounded[0][0][0], int):  # no free batch is possible
            raise
        return torch.export.export(module, inputs, dynamic_shapes=bounded, strict=False)


def check_opset(opset: int) -> None:
    if opset not in OPSETS:
        raise UsageError(
            f"opset {opset} is not possible: exports use 20 (the first with Gelu) to {OPSETS[-1]}. Pass one of these."
        )


def denoiser_inputs(signature: Signature) -> dict[str, Tensor]:
    """Example inputs of a denoiser graph, in their order."""
    return {name: torch.from_numpy(array) for name, array in signature.zeros(EXAMPLE_BATCH).items()}


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """Regions of another precision, or of none, would become graphs inside the graph; the trace is float32 anyway."""
    entering, leaving = torch.autocast.__enter__, torch.autocast.__exit__
    torch.autocast.__enter__ = lambda region: region  # type: ignore[method-assign]
    torch.autocast.__exit__ = lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = entering, leaving  # type: ignore[method-assign]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports on libraries that we do not use and on its own deprecations; neither helps our users."""
    names = "torch.onnx._internal.exporter._registration", "onnx_ir.passes.common.initializer_deduplication"
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
