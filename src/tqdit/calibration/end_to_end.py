"""The error of whole fake-quantized networks on a few calibration rows: what searches over their settings lower."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.cost import Meter
from tqdit.calibration.rows import CalibrationRows, sampling_of
from tqdit.models.loaded import LoadedModel
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.table import ScaleTable
from tqdit.sampling.process import Unsampled

ROWS, BATCH = 32, 8


class EndToEnd:
    """On up to ROWS rows, spread over the groups. phase: under which `meter` counts the calls.

    weighted: rows count by the square of what an error at their step does to the next state.
    """

    def __init__(
        self, model: LoadedModel, config: QuantizationConfig, rows: CalibrationRows, meter: Meter, phase: str,
        weighted: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.rows, self.meter, self.phase = model, rows, meter, phase
        self.index = torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).round().long()
        self.weights = torch.ones(len(self.index), dtype=torch.float64)
        spec = sampling_of(model, config)
        if weighted and not isinstance(spec.process, Unsampled):
            self.weights = (
                torch.from_numpy(spec.schedule.error_weights).double()[rows.step[self.index.cpu()].cpu()] ** 2
            )

    def error(self, table: ScaleTable) -> float:
        """sum |eps^ - eps|^2 / sum |eps|^2 of the network that `table` describes; infinite if it is no number."""
        wrong = self._energy(self._predict(apply(self.model, table)) - self._reference)
        error = wrong / max(self._energy(self._reference), 1e-30)
        return error if math.isfinite(error) else math.inf

    @cached_property
    def _reference(self) -> Tensor:
        return self._predict(self.model)

    def _energy(self, x: Tensor) -> float:
        return float((self.weights * x.square().flatten(1).sum(1)).sum())

    @torch.no_grad()
    def _predict(self, model: LoadedModel) -> Tensor:
        """(R, C, ...) float64."""
        channels = self.rows.target.shape[1]
        self.meter.forward(self.phase, len(self.index))
        found = []
        for index in torch.split(self.index, BATCH):
            inputs = {name: tensor[index.to(tensor.device)] for name, tensor in self.rows.inputs.items()}
            found.append(model.call(inputs)[:, :channels].double().cpu())
        return torch.cat(found)
