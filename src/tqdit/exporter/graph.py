"""From a loaded model to an ONNX graph and its card."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir

from tqdit.bounds import check_count
from tqdit.card import DEFAULT_ATTENTION, AttentionForm, GraphCard, GraphName
from tqdit.errors import FileFormatError, TqditWarning, UsageError
from tqdit.exporter.passes.names import name_by_modules
from tqdit.exporter.passes.quantize import describe, quantize
from tqdit.exporter.step import SamplingStep, step_inputs
from tqdit.exporter.trace import OPSETS, check_opset, denoiser_inputs, fixed_rows, trace, trace_any_rows
from tqdit.golden import CALLS_KEY
from tqdit.interface import Interface
from tqdit.models.loaded import LoadedModel, PositionalCall
from tqdit.models.recording import as_recording
from tqdit.quantization.fold import fold
from tqdit.quantization.table import ScaleTable
from tqdit.sampling.forecasts import RESIDUAL
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.process import TRAINING_STEPS, Process
from tqdit.sampling.schedule import SamplingSpec

ROW_BY_ROW = (
    "its code looks at single rows, so the graph takes one row a call; engines run the rows of a batch in turn."
)


@dataclass(frozen=True)
class ExportConfig:
    """What the user chose; None means: as the scales were found, or as the model's origin samples."""

    graph: GraphName = "denoiser"
    steps: int | None = None
    sampler: str | None = None
    guided: bool = True
    attention: AttentionForm = DEFAULT_ATTENTION  # of a quantized graph
    opset: int = OPSETS.start
    forecast: bool = False  # also return the residual of the blocks, from which an engine makes forecasts

    def __post_init__(self) -> None:
        check_opset(self.opset)  # before a model is loaded for it
        if self.steps is not None:
            check_count("steps", self.steps, 1, TRAINING_STEPS)
        if self.forecast and self.graph == "step":
            raise UsageError("a step graph has its sampler inside and no forecasts. Leave --graph or --forecast out.")

    def sampling(self, model: LoadedModel, table: ScaleTable | None = None) -> SamplingSpec:
        """The chain that the file proposes, or that a step graph computes."""
        own, placed = calibrated_for(model, table), None if table is None else table.placed
        chain = model.sampling.choose(own.steps, own.sampler)
        if self.graph == "denoiser" and placed is not None:
            try:
                chain = model.sampling.choose(None, placed.sampler, placed.timesteps, full_calls=placed.full_calls)
            except UsageError as error:
                raise FileFormatError(f"the scale table's placed steps: {error} Calibrate again.") from error
        elif self.graph == "denoiser" and model.proposed is not None and own == model.sampling:
            chain = model.proposed  # unless the scales were found for a chain that the user named
        return chain.choose(self.steps, self.sampler)

    def returns_residual(self, model: LoadedModel, table: ScaleTable | None = None) -> bool:
        """Whether the graph is for forecasts: because the user or the scale table's chain asks for them."""
        return self.graph == "denoiser" and (self.forecast or bool(self.sampling(model, table).full_calls))

    def guidance(self, model: LoadedModel, table: ScaleTable | None = None) -> Guidance | None:
        """With the scale that the quantization scales were found for."""
        if model.guidance is None or not self.guided:
            return None
        return model.guidance if table is None else replace(model.guidance, scale=table.guidance_scale)


def interface_of(table: ScaleTable | None, rows: Any) -> Interface | None:
    """How a pipeline's network is called: what the scales were found with, or what recorded calls tell."""
    if rows is None:
        return None if table is None else table.interface
    if table is not None:
        what = rows if isinstance(rows, str | Path) else "rows"
        raise UsageError(
            f"{what}: recorded calls are for an export without scales, and there are scales, which tell how "
            "the network is called. Drop --rows, or pass --float in place of --scales."
        )
    return as_recording(rows).interface


def calibrated_for(model: LoadedModel, table: ScaleTable | None) -> SamplingSpec:
    """The chain that a table's scales were found for; the model's own if the table does not say, or there is none."""
    settings = {} if table is None else table.settings
    own = model.sampling
    try:
        process = msgspec.convert(settings["process"], Process) if "process" in settings else own.process
    except (msgspec.ValidationError, UsageError) as error:
        raise FileFormatError(f"the scale table's setting 'process' is damaged ({error}). Calibrate again.") from error
    return SamplingSpec(process, settings.get("sampler") or own.sampler, settings.get("steps") or own.steps)


def export_graph(
    model: LoadedModel, config: ExportConfig, table: ScaleTable | None = None
) -> tuple[ir.Model, GraphCard]:
    """The denoiser graph or the step graph of a model, with its card; quantized if a scale table is given.

    Raises UsageError if the table is for another model or does not fit the trace. Warns if the scales were found for
    another chain than the one that the file proposes.
    """
    if table is not None:
        table.check_model(model.fingerprint, model.source)
        if table.correction is not None and config.graph == "step":
            raise UsageError(
                "the scale table has a correction of sampling (tqdit-calibrate --correction), which a step graph does "
                "not compute. Export the denoiser, or calibrate without it."
            )
        if table.correction is not None:
            table.correction.check_channels(model.signature.channels)
        model, table = fold(model, table)
    graph, card = finish_graph(trace_graph(model, config, table), model, config, table)
    if card.rows is not None:
        warnings.warn(f"{model.source}: {ROW_BY_ROW}", TqditWarning, stacklevel=2)
    if remark := card.remark(card.sampling):
        warnings.warn(remark, TqditWarning, stacklevel=2)
    return graph, card


def trace_graph(model: LoadedModel, config: ExportConfig, table: ScaleTable | None = None) -> ir.Model:
    """The float trace that the passes start from."""
    if config.graph == "denoiser":
        residual = config.returns_residual(model, table)
        outputs = ["prediction", RESIDUAL] if residual else "prediction"
        call, inputs = PositionalCall(model, residual), denoiser_inputs(model.signature)
        return trace_any_rows(call, inputs, outputs, config.opset, model.weights)
    guidance = config.guidance(model, table)
    step = SamplingStep(model, config.sampling(model, table), guidance)
    return trace(step, step_inputs(model.signature, guidance), "x_next", config.opset, weights=model.weights)


def finish_graph(
    graph: ir.Model, model: LoadedModel, config: ExportConfig, table: ScaleTable | None
) -> tuple[ir.Model, GraphCard]:
    """Run the passes over a float trace, in place, and describe the result. The table has no divisors (`fold`)."""
    if table is not None:
        quantize(graph, model, table, config.attention)
    name_by_modules(graph)
    if table is not None and table.golden is not None and config.graph == "denoiser":
        graph.metadata_props[CALLS_KEY] = table.golden.to_text()
    card = model.card(
        config.graph,
        sampling=config.sampling(model, table),
        guidance=config.guidance(model, table),
        quantization=None
        if table is None
        else describe(model.products, table, config.attention, calibrated_for(model, table)),
    )
    found = [value for value in graph.graph.outputs if value.name == RESIDUAL]
    return graph, replace(
        card, rows=fixed_rows(graph), correction=None if table is None else table.correction,
        residual=tuple(int(str(size)) for size in (found[0].shape or ())[1:]) if found else None,
    )  # fmt: skip
