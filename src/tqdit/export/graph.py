"""From a loaded model to an ONNX graph and its card."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from tqdit import __version__
from tqdit.card import AttentionForm, GraphCard, GraphName
from tqdit.diffusion import SamplerName, SamplingSpec
from tqdit.export.passes.names import name_by_modules
from tqdit.export.passes.quantize import describe, quantize
from tqdit.export.step import SamplingStep
from tqdit.export.trace import OPSETS, check_opset, denoiser_inputs, step_inputs, trace
from tqdit.models.loaded import LoadedModel
from tqdit.quantization.fold import fold
from tqdit.quantization.table import ScaleTable


@dataclass(frozen=True)
class ExportConfig:
    """What the user chose; None means: as the checkpoint's origin does."""

    graph: GraphName = "step"
    steps: int | None = None
    sampler: SamplerName | None = None
    guided: bool = True
    attention: AttentionForm = "simulated"  # of a quantized graph
    opset: int = OPSETS.start

    def __post_init__(self) -> None:
        check_opset(self.opset)  # before a model is loaded for it

    def sampling(self, model: LoadedModel) -> SamplingSpec:
        spec = model.sampling
        steps = spec.steps if self.steps is None else self.steps
        return replace(spec, steps=steps, sampler=self.sampler or spec.sampler)


def export_graph(
    model: LoadedModel, config: ExportConfig, table: ScaleTable | None = None
) -> tuple[ir.Model, GraphCard]:
    """The step graph or the denoiser graph of a model, with its card; quantized where a scale table is given.

    Raises UsageError where the table is for another model or does not fit the trace.
    """
    if table is not None:
        table.check_model(model.fingerprint, model.source)
        model, table = fold(model, table)
    return finish_graph(trace_graph(model, config), model, config, table)


def trace_graph(model: LoadedModel, config: ExportConfig) -> ir.Model:
    """The float trace that the passes start from."""
    shape = (model.in_channels, model.height, model.width)
    if config.graph == "denoiser":
        return trace(model.network, denoiser_inputs(shape), "noise_pred", config.opset)
    step = SamplingStep(model, config.sampling(model))
    return trace(step, step_inputs(shape, config.guided), "x_next", config.opset)


def finish_graph(
    graph: ir.Model, model: LoadedModel, config: ExportConfig, table: ScaleTable | None
) -> tuple[ir.Model, GraphCard]:
    """Run the passes over a float trace, in place, and describe the result. The table has no divisors (`fold`)."""
    if table is not None:
        quantize(graph, model.network, table, config.attention)
    name_by_modules(graph)
    card = GraphCard(
        graph=config.graph,
        channels=model.in_channels,
        out_channels=model.out_channels,
        height=model.height,
        width=model.width,
        num_classes=model.num_classes,
        guided=config.guided and config.graph == "step",
        guidance_scale=model.guidance_scale if table is None else table.guidance_scale,
        sampling=config.sampling(model),
        latent_scale=model.latent_scale,
        class_names=model.class_names,
        model=model.source,
        origin=model.origin,
        fingerprint=model.fingerprint,
        written_by=__version__,
        quantization=None if table is None else describe(table, config.attention),
    )
    return graph, card
