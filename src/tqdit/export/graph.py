"""From a loaded model to an ONNX graph and its card."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from tqdit import __version__
from tqdit.card import GraphCard, GraphName
from tqdit.diffusion import SamplerName, SamplingSpec
from tqdit.export.step import SamplingStep
from tqdit.export.trace import denoiser_inputs, step_inputs, trace
from tqdit.models import LoadedModel


@dataclass(frozen=True)
class ExportConfig:
    """What the user chose; None means: as the checkpoint's origin does."""

    graph: GraphName = "step"
    steps: int | None = None
    sampler: SamplerName | None = None
    guided: bool = True

    def sampling(self, model: LoadedModel) -> SamplingSpec:
        spec = model.sampling
        return replace(
            spec, steps=spec.steps if self.steps is None else self.steps, sampler=self.sampler or spec.sampler
        )


def export_graph(model: LoadedModel, config: ExportConfig) -> tuple[ir.Model, GraphCard]:
    """The step graph or the denoiser graph of a model, with its card."""
    shape = (model.in_channels, model.height, model.width)
    spec = config.sampling(model)
    if config.graph == "step":
        step = SamplingStep(model, spec)
        graph = trace(step, step_inputs(shape, config.guided), "x_next")
    else:
        graph = trace(model.network, denoiser_inputs(shape), "noise_pred")
    card = GraphCard(
        graph=config.graph,
        channels=model.in_channels,
        out_channels=model.out_channels,
        height=model.height,
        width=model.width,
        num_classes=model.num_classes,
        guided=config.guided and config.graph == "step",
        guidance_scale=model.guidance_scale,
        sampling=spec,
        latent_scale=model.latent_scale,
        class_names=model.class_names,
        model=model.source,
        origin=model.origin,
        fingerprint=model.fingerprint,
        written_by=__version__,
    )
    return graph, card
