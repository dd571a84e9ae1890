"""What a calibration hands on: the scale table, and rows for its golden calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.rows import CalibrationRows, sampling_of
from tqdit.calibration.work import versions
from tqdit.golden import MOST_BYTES
from tqdit.models.loaded import LoadedModel
from tqdit.models.rewrites import Tensors
from tqdit.quantization.table import ScaleTable, Site


def make_table(
    model: LoadedModel, config: QuantizationConfig, boundaries: NDArray[np.float64], sites: Iterable[Site],
    errors: dict[str, float], layers: Mapping[str, Tensors],
) -> ScaleTable:  # fmt: skip
    """The table of what was found under `config`. layers: as `fold_layers` takes them."""
    spec = sampling_of(model, config)
    columns = {"layer_columns": config.layer_columns} if config.layer_columns else {}
    arrays = {name: {key: tensor.cpu().numpy() for key, tensor in own.items()} for name, own in layers.items()}
    sites = list(sites)
    for index, site in enumerate(sites):  # a layer that is not rewritten keeps its divisor beside its input's scale
        if site.role == "input" and site.module in arrays:
            sites[index] = replace(site, divisor=arrays.pop(site.module)["divisor"])
    return ScaleTable(
        model=model.source,
        fingerprint=model.fingerprint,
        boundaries=boundaries,
        sites=tuple(sites),
        seed=config.seed,
        guidance_scale=1.0 if config.guidance_scale is None else config.guidance_scale,
        settings={**config.to_json(), **columns, "sampler": spec.sampler, "process": msgspec.to_builtins(spec.process)},
        versions=versions(model.device),
        errors=errors,
        layers=arrays,
    )


def some_inputs(rows: CalibrationRows, most: int) -> dict[str, NDArray[Any]]:
    """The inputs of up to `most` rows, spread over the groups, as golden calls hold them."""
    row_bytes = sum(tensor[0].nbytes for tensor in rows.inputs.values()) + 4 * rows.target[0].numel()
    count = max(1, min(most, len(rows), MOST_BYTES // row_bytes))
    index = torch.linspace(0, len(rows) - 1, count).round().long()
    return {name: tensor.cpu()[index].numpy() for name, tensor in rows.inputs.items()}
