"""Inside the model: what each layer adds to the error, which tensors cost most, and which changes reduce it.

Everything is measured on calibration rows, without chains. The error of a row is that of its prediction, weighted by
the factor with which it enters the sampler's next state, as in the calibration's step-weighted objective:
    E = sum c_t^2 |eps^ - eps|^2 / sum c_t^2 |eps|^2.
An *image* is what one chain had at one step: one row, or with guidance the two rows of a pair.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tqdit.calibration.capture import Capture
from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.cost import product_costs
from tqdit.calibration.flow import Calibration
from tqdit.calibration.rows import CalibrationRows
from tqdit.card import GraphCard
from tqdit.console import Console
from tqdit.models.load import load_model
from tqdit.models.loaded import LoadedModel
from tqdit.models.products import Product, prediction_of, watched
from tqdit.models.recording import Recording
from tqdit.quantization.fake_quant import QuantizedNetwork, find_module, quantize_module
from tqdit.quantization.fold import fold
from tqdit.quantization.granularity import PerTimestepGroup, PerToken, Role
from tqdit.quantization.quantizer import Part
from tqdit.quantization.table import ScaleTable, Site
from tqdit.sampling.guidance import rows_per_image

Float64 = NDArray[np.float64]
BATCH = 64  # rows of a forward pass
IMAGES = 80  # whose rows judge, spread over the groups
ELEMENTWISE = 32 * 32  # bit operations of one float32 multiplication
RESAMPLES = 500


@dataclass(frozen=True)
class TensorGain:
    """One tensor left in float: by how much the error falls. Intervals are 95 %, over images."""

    layer: str
    role: Role
    gain: float  # share of E that is removed
    low: float
    high: float


@dataclass(frozen=True)
class Remedy:
    """One change of a layer: by how much the error falls, and what it costs in bit operations of the whole model."""

    layer: str
    change: dict[str, Any]  # knobs of the calibration
    gain: float
    low: float
    high: float
    cost: float  # extra bit operations, as a share of the model's

    @property
    def gain_per_cost(self) -> float:
        return self.gain / max(self.cost, 1e-9)


class Diagnosis:
    """A model, its scale table, and rows that judge both."""

    def __init__(
        self, model: LoadedModel, table: ScaleTable, work: Path, console: Console, images: int = IMAGES,
        calls: Recording | None = None,
    ) -> None:  # fmt: skip
        table.check_model(model.fingerprint, model.source)
        model, table = fold(model, table)  # a layer that is searched again keeps the divisors of its neighbours
        self.model, self.table, self.console = model, table, console
        self.products = {product.name: product for product in model.products}
        config = QuantizationConfig.of_settings(table.settings)
        method = "search" if config.method == "weights" else config.method  # a remedy needs rows, and they are here
        self.config = replace(config, equalize="none", equalize_all=False, method=method).for_model(model)
        self.calls = calls  # what the calibration took its rows from; None: chains of the model
        self.calibration = Calibration(model, self.config, work, console, calls)
        self.every_row = self.calibration.rows()
        self.rows_per_image = rows_per_image(model.guidance)
        self.rows = _some(self.every_row, images, self.rows_per_image)
        factors = self.calibration.spec.schedule.error_weights[self.rows.step.cpu().numpy()]
        self.weights = np.square(factors)  # (R,)
        self.quantized = QuantizedNetwork(model.network, table, model.signature.time.name).eval()
        self.prediction = self._predict(model.network)
        energy = (self.weights * _squares(self.prediction)).sum()
        self._scale = len(self.weights) / self.rows_per_image / energy
        self.base = self.errors(self.quantized)  # of the quantized network as it is, before anything is replaced

    def batches(self) -> Iterator[slice]:
        """The rows of each forward pass."""
        for start in range(0, len(self.rows), BATCH):
            yield slice(start, min(start + BATCH, len(self.rows)))

    @torch.no_grad()
    def _predict(self, network: nn.Module) -> Tensor:
        """The channels that the state has, float64 (R, C, ...)."""
        outputs = (prediction_of(network(**self.rows.part(part.start, part.stop))) for part in self.batches())
        return torch.cat([output[:, : self.model.signature.channels].double() for output in outputs])

    def errors(self, network: nn.Module) -> Float64:
        """Of each image (R / rows per image,), in units of E: their mean is E."""
        squares = self.weights * _squares(self._predict(network) - self.prediction)
        of_images: Float64 = squares.reshape(-1, self.rows_per_image).sum(axis=1) * self._scale
        return of_images

    def gain(self, errors: Float64) -> tuple[float, float, float]:
        """(share of E that is removed, low, high) against the quantized network, resampling images."""
        rng = np.random.default_rng(0)
        chosen = rng.integers(0, len(errors), (RESAMPLES, len(errors)))
        draws = 1 - errors[chosen].sum(axis=1) / self.base[chosen].sum(axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        return float(1 - errors.sum() / self.base.sum()), float(low), float(high)

    def quantize(self, layer: str, sites: Mapping[str, Site]) -> nn.Module:
        """A layer of the float network, quantized by these sites."""
        module = find_module(self.model.network, layer)
        return quantize_module(layer, module, sites, self.quantized.rows).to(self.model.device)

    @contextmanager
    def replaced(self, layer: str, module: nn.Module) -> Iterator[QuantizedNetwork]:
        """The quantized network with another module in one place."""
        parent_name, _, leaf = layer.rpartition(".")
        parent = self.quantized.network.get_submodule(parent_name)
        before = getattr(parent, leaf)
        setattr(parent, leaf, module)
        try:
            yield self.quantized
        finally:
            setattr(parent, leaf, before)


def _squares(prediction: Tensor) -> Float64:
    found: Float64 = prediction.square().flatten(1).sum(1).cpu().numpy()
    return found


def _some(rows: CalibrationRows, images: int, each: int) -> CalibrationRows:
    """The rows of `images` images, `each` rows of each, spread evenly over all, which are sorted by group."""
    every = len(rows) // each
    chosen = np.unique(np.linspace(0, every - 1, min(images, every)).round().astype(np.int64))
    index = torch.from_numpy((each * chosen[:, None] + np.arange(each)).reshape(-1)).to(rows.step.device)
    return replace(
        rows, inputs={name: tensor[index] for name, tensor in rows.inputs.items()}, step=rows.step[index],
        group=rows.group[index], target=rows.target[index],
    )  # fmt: skip


# what each layer adds, by group of timesteps -------------------------------------------------------------------------


@torch.no_grad()
def layer_errors(diagnosis: Diagnosis) -> dict[str, list[float]]:
    """layer -> relative squared error of its output for each group of timesteps, its input being the float model's."""
    groups = diagnosis.table.groups
    totals = {name: np.zeros((2, groups)) for name in diagnosis.table.by_module}
    group = diagnosis.rows.group.cpu().numpy()
    float_network, quantized = diagnosis.model.network, diagnosis.quantized
    twins = {name: find_module(quantized.network, name) for name in totals}
    part = slice(0, 0)

    def compare(name: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        errors = _squares((twins[name](*inputs) - output).double()), _squares(output.double())
        for row, values in enumerate(errors):
            totals[name][row] += np.bincount(group[part], values, minlength=groups)

    with watched(float_network, totals, compare):
        for part in diagnosis.batches():
            with quantized.rows.set(diagnosis.rows.group[part]):
                float_network(**diagnosis.rows.part(part.start, part.stop))
    return {
        name: np.divide(wrong, energy, out=np.zeros(groups), where=energy > 0).tolist()
        for name, (wrong, energy) in totals.items()
    }


# leave one out -------------------------------------------------------------------------------------------------------


class FloatOperand(nn.Module):
    """An operand of a product that is not quantized, with the interface of one that is."""

    def parts(self, x: Tensor) -> Iterator[Part[Tensor]]:
        yield Part(x)


def leave_one_out(diagnosis: Diagnosis, advance: Callable[[], object]) -> list[TensorGain]:
    """Every tensor of the table in turn left in float; the largest gain first."""
    gains = []
    for site in diagnosis.table.sites:
        held = diagnosis.table.by_module[site.module]
        is_product = site.role in ("left", "right")  # which needs both operands
        changed = diagnosis.quantize(
            site.module, {role: other for role, other in held.items() if role != site.role or is_product}
        )
        if is_product:
            setattr(changed, site.role, FloatOperand())
        with diagnosis.replaced(site.module, changed) as network:
            gains.append(TensorGain(site.module, site.role, *diagnosis.gain(diagnosis.errors(network))))
        advance()
    return sorted(gains, key=lambda gain: -gain.gain)


# remedies -------------------------------------------------------------------------------------------------------------


def changes_for(product: Product, sites: Mapping[str, Site]) -> list[dict[str, Any]]:
    """What can be changed about one layer: more bits, two regions, scales per group of timesteps, asymmetric inputs,
    and for the small final layer an input in float."""
    found: list[dict[str, Any]] = []
    activations = [site.quantizer for role, site in sites.items() if role != "weight"]
    weight, left = sites.get("weight"), sites.get("input", sites.get("left"))
    if activations and min(q.bits for q in activations) < 8:
        more = min(8, min(q.bits for q in activations) + 2)
        grouped = any("group_bits" in q.tensors for q in activations)
        found.append({"group_bits": str(more)} if grouped else {"activation_bits": more})
    if weight is not None and weight.quantizer.bits < 8:
        found.append({"weight_bits": min(8, weight.quantizer.bits + 2)})
    if product.place == "final" and "input" in sites:
        found.append({"final": "weights"})  # its input in float
    stored = left is not None and left.quantizer.tensors  # scales of tokens have no regions and no groups
    if product.made_by is not None and left is not None and stored and left.quantizer.scheme != product.made_by:
        found.append({product.made_by: "two-region"})
    if not product.folded and any(not isinstance(q.granularity, PerTimestepGroup | PerToken) for q in activations):
        found.append({"time_groups": "all"})
    if "input" in sites and sites["input"].quantizer.scheme == "symmetric":
        found.append({"inputs": "asymmetric"})
    return found


def remedies(
    diagnosis: Diagnosis, wanted: list[tuple[str, dict[str, Any]]], advance: Callable[[], object]
) -> list[Remedy]:
    """Each change (layer, knobs) searched anew and measured; the largest gain per cost first."""
    if not wanted:
        return []
    layers = {layer for layer, _ in wanted}
    plans = tuple(entry for entry in diagnosis.calibration.plans if entry.name in layers)
    capture = diagnosis.calibration.capture(diagnosis.model, diagnosis.every_row, plans, "remedies")
    costs, found = BitOperations(diagnosis), []
    for layer, change in wanted:
        sites = _search(diagnosis, capture, layer, change)
        with diagnosis.replaced(layer, diagnosis.quantize(layer, sites)) as network:
            gain = diagnosis.gain(diagnosis.errors(network))
        found.append(Remedy(layer, change, *gain, costs.extra(layer, sites)))
        advance()
    capture.delete()
    return sorted(found, key=lambda remedy: -remedy.gain_per_cost)


def _search(diagnosis: Diagnosis, capture: Capture, layer: str, change: dict[str, Any]) -> dict[str, Site]:
    """The sites of one layer, searched again with one change on the samples of the calibration's rows."""
    config = diagnosis.config.with_layer_knobs([(layer, change)])
    weight: Tensor | None = getattr(find_module(diagnosis.model.network, layer), "weight", None)
    with tempfile.TemporaryDirectory() as folder:
        run = Calibration(diagnosis.model, config, Path(folder), Console(quiet=True), diagnosis.calls)
    entry = next(entry for entry in run.plans if entry.name == layer)
    sites, _ = run.solve(entry, capture.samples(layer), weight, diagnosis.every_row)
    return {site.role: site for site in sites}


class BitOperations:
    """What a forward pass costs: multiply-adds times the bits of both operands."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        self.costs = product_costs(diagnosis.model)
        self.table = diagnosis.table
        held = diagnosis.table.by_module
        self.total = float(sum(self.of(name, held.get(name, {})) for name in self.costs))

    def of(self, layer: str, sites: Mapping[str, Site]) -> float:
        """32 bits for a tensor that stays float; one float32 multiplication per element for a scale per group."""
        left, right = sites.get("input", sites.get("left")), sites.get("weight", sites.get("right"))
        cost = self.costs[layer]
        count = float(cost.multiply_adds * _bits(left) * _bits(right))
        if left is not None and left.quantizer.scheme in ("gelu", "softmax", "softmax_numerator"):
            count *= 2  # the second region is a second product
        for site, elements in zip((left, right), cost.elements, strict=False):  # a weight has none
            if site is not None and _touches(site):
                count += 2 * ELEMENTWISE * elements
        return count

    def extra(self, layer: str, sites: Mapping[str, Site]) -> float:
        """Share of the model's bit operations that other sites of one layer add."""
        return (self.of(layer, sites) - self.of(layer, self.table.by_module[layer])) / self.total


def _bits(site: Site | None) -> float:
    if site is None:
        return 32
    return float(np.mean(site.quantizer.arrays().get("group_bits", site.quantizer.bits)))


def _touches(site: Site) -> bool:
    """Whether its integer form works on each element outside the product: x / r, x - b, and back."""
    scheme = site.quantizer.scheme
    return (
        scheme in ("asymmetric", "softmax_numerator")
        or not site.quantizer.tensors
        or (scheme != "softmax" and isinstance(site.quantizer.granularity, PerTimestepGroup))
    )


def diagnose(diagnosis: Diagnosis, layers: int, console: Console) -> dict[str, Any]:
    """Everything of `tqdit-evaluate --layers`: gains, remedies of the worst layers, and the advice that follows."""
    with console.bar(len(diagnosis.table.sites), "leaving one tensor in float", "tensors") as bar:
        gains = leave_one_out(diagnosis, bar.update)
    worst = list(dict.fromkeys(gain.layer for gain in gains))[:layers]
    held = diagnosis.table.by_module
    wanted = [(layer, change) for layer in worst for change in changes_for(diagnosis.products[layer], held[layer])]
    with console.bar(len(wanted), "remedies", "changes") as bar:
        found = remedies(diagnosis, wanted, bar.update)
    return {
        "tqdit_diagnosis": 1,
        "model": diagnosis.table.model,
        "fingerprint": diagnosis.table.fingerprint,
        "settings": dict(diagnosis.table.settings),
        "rows": len(diagnosis.rows),
        "error": float(diagnosis.base.mean()),
        "sites": [vars(gain) for gain in gains],
        "remedies": [vars(remedy) | {"gain_per_cost": remedy.gain_per_cost} for remedy in found],
        "advice": advice(found),
    }


def advice(found: list[Remedy]) -> list[dict[str, Any]]:
    """For each layer the changes that certainly help (the interval of their gain lies above zero), best value first."""
    chosen: dict[str, dict[str, Any]] = {}
    for remedy in found:
        if remedy.low > 0:
            chosen.setdefault(remedy.layer, {}).update(remedy.change)
    return [{"layer": layer, "change": change} for layer, change in chosen.items()]


def look_inside(
    table: ScaleTable, card: GraphCard, kept_rows: Path, diagnosed: int | None, console: Console,
    calls: Recording | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Errors of the layers and, with a number of layers to try remedies on, the diagnosis; None without one.

    kept_rows: the folder in which the calibration kept its rows; without it they are sampled again. calls: recorded
    ones, of a model that is known by them.
    """
    model = load_model(card.model, interface=table.interface)
    with tempfile.TemporaryDirectory() as temporary:
        # copies: a calibration that was stopped there must find everything as it left it
        for rows in kept_rows.glob("rows-*.safetensors"):
            shutil.copy(rows, temporary)
        diagnosis = Diagnosis(model, table, Path(temporary), console, calls=calls)
        return {
            "layers": {"boundaries": table.boundaries.tolist(), "errors": layer_errors(diagnosis)},
            "diagnosis": None if diagnosed is None else diagnose(diagnosis, diagnosed, console),
        }


def scales_over_time(table: ScaleTable) -> list[dict[str, Any]]:
    """The scales of every tensor that has one per group of timesteps."""
    found = []
    for site in table.sites:
        if isinstance(site.quantizer.granularity, PerTimestepGroup):
            values = site.arrays()[site.quantizer.plotted]
            found.append({"site": site.name, "scales": [float(value) for value in values]})
    return found
