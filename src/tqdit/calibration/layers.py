"""Which tensors of a network are quantized, and how: the plan that a search fills with numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from tqdit.calibration.config import NUMERATOR_KEYS, QuantizationConfig, wholes
from tqdit.errors import UsageError, nearest
from tqdit.models.loaded import LoadedModel
from tqdit.models.products import Convolution, Place, Product, Scores, ValueProduct, is_linear
from tqdit.models.rewrites import Rewrites
from tqdit.quantization.granularity import Role
from tqdit.quantization.schemes import find_schemes


@dataclass(frozen=True)
class OperandPlan:
    """How one tensor is quantized. `scales` is the number of independent scales: 1, groups or output channels.

    options: settings that the scheme alone knows (`Quantizer.fixed`).
    """

    scheme: str
    bits: int
    scales: int
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerPlan:
    """One product with the operands that are quantized; an operand without a plan stays float."""

    layer: Product
    operands: dict[Role, OperandPlan]

    @property
    def name(self) -> str:
        return self.layer.name


def rewrites_of(config: QuantizationConfig) -> Rewrites:
    """How the layers of a network are rewritten before anything is quantized."""
    return Rewrites(config.columns, config.rotate, config.rank, config.equalize_all, config.layer_columns)


def plan(model: LoadedModel, config: QuantizationConfig) -> tuple[LayerPlan, ...]:
    """The products that `config` quantizes, of a model whose layers are rewritten as it says."""
    known = {whole: None for product in model.products for whole in wholes(product.name)}
    unknown = set(config.layer_knobs) - set(known)
    if unknown:
        name = min(unknown)
        raise UsageError(f"--overrides names '{name}', which is no layer of this model. Name one such as "
                         f"'{nearest(name, known)}'.")  # fmt: skip
    plans = (
        _plan_layer(model.network.get_submodule(product.name), product, config.for_layer(product.name))
        for product in model.products
    )
    return tuple(layer_plan for layer_plan in plans if layer_plan.operands)


def _plan_layer(module: nn.Module, layer: Product, config: QuantizationConfig) -> LayerPlan:
    if not (is_linear(module) or isinstance(module, Scores | ValueProduct)):
        return LayerPlan(layer, {})
    if layer.place == "attention":
        if not config.attention:
            return LayerPlan(layer, {})
        bits = max(config.attention_bits, config.activation_bits)
        right = OperandPlan("symmetric", bits, _groups(layer, config, "symmetric"))
        return LayerPlan(layer, {"left": _left(layer, config, bits), "right": right})
    parts: dict[Place, str] = {
        "block": "all", "patch": config.patch, "final": config.final, "conditioning": config.conditioning
    }  # fmt: skip
    least = 2 if layer.place == "block" else config.outer_bits
    operands: dict[Role, OperandPlan] = {}
    if parts[layer.place] != "none":
        assert isinstance(module, nn.Linear | Convolution)
        scales = module.weight.shape[0] if config.weight_granularity == "channel" else layer.row_blocks
        operands["weight"] = OperandPlan("symmetric", max(least, config.weight_bits), scales)
    if parts[layer.place] == "all":
        operands["input"] = _input(layer, config, max(least, config.activation_bits))
    return LayerPlan(layer, operands)


def _left(layer: Product, config: QuantizationConfig, bits: int) -> OperandPlan:
    groups = _groups(layer, config, layer.made_by or "symmetric")
    if layer.made_by != "softmax" or config.softmax == "uniform":
        return OperandPlan("symmetric", bits, groups)
    numerators = config.softmax == "numerator" or (config.softmax != "probability" and layer.columns >= NUMERATOR_KEYS)
    scheme = "softmax_numerator" if numerators else "softmax"
    return OperandPlan(scheme, bits, groups, {"top": config.softmax_top})


def _input(layer: Product, config: QuantizationConfig, bits: int) -> OperandPlan:
    scheme = "gelu" if layer.made_by == "gelu" and config.gelu != "uniform" else config.inputs
    groups = _groups(layer, config, scheme)
    if "group_bits" not in find_schemes()[scheme].tensors:
        return OperandPlan(scheme, bits, groups)
    given = config.group_bits if layer.place == "block" and config.group_bits else str(bits)
    text = given if "/" in given else "/".join([given] * groups)
    try:
        found = len(find_schemes()[scheme].fixed(bits, group_bits=text)["group_bits"])
    except ValueError as error:
        raise UsageError(f"--group-bits is '{given}': expected numbers of 2..8 such as 8/6/4. Change them.") from error
    if found != groups:
        raise UsageError(f"--group-bits '{given}' are {found} numbers; '{layer.name}' has {groups} groups. "
                         "Pass one for each, with --time-groups all.")  # fmt: skip
    return OperandPlan(scheme, bits, groups, {"group_bits": text})


def with_one_region(layer_plan: LayerPlan, config: QuantizationConfig) -> LayerPlan | None:
    """The same layer with one region, if `config` leaves the choice; None if it does not.

    One region of probabilities has one scale for all groups: engines then make one integer kernel of an attention.
    """
    operands = layer_plan.operands
    if config.gelu == "auto" and "input" in operands and operands["input"].scheme == "gelu":
        uniform = _input(layer_plan.layer, replace(config, gelu="uniform"), operands["input"].bits)
        return replace(layer_plan, operands={**operands, "input": uniform})
    if config.softmax == "auto" and "left" in operands and operands["left"].scheme in ("softmax", "softmax_numerator"):
        uniform = OperandPlan("symmetric", operands["left"].bits, 1)
        return replace(layer_plan, operands={**operands, "left": uniform})
    return None


def _groups(layer: Product, config: QuantizationConfig, scheme: str) -> int:
    """A scale for each row's group needs rows on axis 0, and a scale."""
    grouped = config.time_groups == "all" or (config.time_groups == "softmax" and scheme == "softmax")
    return config.groups if grouped and not layer.folded and find_schemes()[scheme].tensors else 1
