"""Torch module to ONNX graph: the float trace on which the passes work."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping

import onnx_ir as ir
import torch
from torch import Tensor, nn

from tqdit.errors import UsageError
from tqdit.models.scratch import need_compiler, need_temporary_folder

OPSETS = range(20, 24)  # 20 is the first with Gelu; 23 the last that torch's exporter writes
_EXAMPLE_BATCH = 3  # a size that no other dimension is derived from, so the exporter cannot mistake it for a constant


def trace(module: nn.Module, inputs: Mapping[str, Tensor | None], output: str, opset: int = OPSETS.start) -> ir.Model:
    """Trace a module into an ONNX graph whose first dimension of every input is the free `batch`.

    `inputs` names the graph's inputs in the order of the module's `forward`, each with an example of batch 3; an input
    that is None is left out of the graph. Module scopes are kept in the nodes' metadata.
    """
    check_opset(opset)
    need_compiler()
    need_temporary_folder()
    batch = torch.export.Dim("batch", min=1, max=65536)
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=opset,
            input_names=[name for name, tensor in inputs.items() if tensor is not None],
            output_names=[output],
            dynamic_shapes=tuple(None if tensor is None else {0: batch} for tensor in inputs.values()),
            verbose=False,
        )
    assert program is not None
    return program.model


def check_opset(opset: int) -> None:
    if opset not in OPSETS:
        raise UsageError(
            f"opset {opset} is not possible: exports use 20 (the first with Gelu) to {OPSETS[-1]}. Pass one of these."
        )


def step_inputs(shape: tuple[int, int, int], guided: bool) -> dict[str, Tensor | None]:
    """Example inputs of a step graph for images of `shape` (C, H, W)."""
    x = torch.zeros(_EXAMPLE_BATCH, *shape)
    index = torch.zeros(_EXAMPLE_BATCH, dtype=torch.int64)
    scale = torch.ones(_EXAMPLE_BATCH) if guided else None
    return {"x": x, "step": index, "class_labels": index.clone(), "guidance_scale": scale, "noise": x.clone()}


def denoiser_inputs(shape: tuple[int, int, int]) -> dict[str, Tensor | None]:
    """Example inputs of a denoiser graph for images of `shape` (C, H, W)."""
    index = torch.zeros(_EXAMPLE_BATCH, dtype=torch.int64)
    return {"x": torch.zeros(_EXAMPLE_BATCH, *shape), "timestep": index, "class_labels": index.clone()}


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
