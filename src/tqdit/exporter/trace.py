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
from tqdit.exporter.program import prepare
from tqdit.models.scratch import need_compiler, need_temporary_folder
from tqdit.ports import Signature

OPSETS = range(20, 24)  # 20 is the first with Gelu; 23 the last that torch's exporter writes
EXAMPLE_BATCH = 3  # a size that no other dimension is derived from, so the exporter cannot mistake it for a constant


def trace(module: nn.Module, inputs: Mapping[str, Tensor], output: str, opset: int = OPSETS.start) -> ir.Model:
    """Trace a module into an ONNX graph whose first dimension of every input is the free `batch`.

    `inputs` names the graph's inputs, each with an example of batch 3; the module's `forward(*inputs)` takes them in
    this order. Module scopes are kept in the nodes' metadata.
    """
    check_opset(opset)
    need_compiler()
    need_temporary_folder()
    batch = torch.export.Dim("batch", min=1, max=65536)
    shapes = (tuple({0: batch} for _ in inputs),)
    with _quiet():
        traced = _program(module.eval(), tuple(inputs.values()), shapes)
        prepare(traced)
        program = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None
    return program.model


def _program(module: nn.Module, inputs: tuple[Tensor, ...], shapes: Any) -> torch.export.ExportedProgram:
    """The traced module. A bound on the batch that a kernel's choice of memory layout suggests is taken for the trace
    alone, as torch's ONNX exporter does: no node of the graph knows it.
    """
    try:
        return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except torch._dynamo.exc.UserError as error:
        bounded = refine_dynamic_shapes_from_suggested_fixes(error.msg, shapes)
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
def _quiet() -> Iterator[None]:
    """The exporter reports on libraries that we do not use and on its own deprecations; neither helps our users."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
