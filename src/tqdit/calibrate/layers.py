"""Which tensors of a network are quantized, and how: the plan that a search fills with numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from tqdit.calibrate.config import QuantizationConfig
from tqdit.errors import UsageError
from tqdit.models.dit import Attention, DiT, DiTBlock, FinalLayer, Mlp, PatchEmbed, TimestepEmbedder
from tqdit.quantization.granularity import Role

Place = Literal["block", "attention", "patch", "final", "conditioning"]


@dataclass(frozen=True)
class Layer:
    """One product of the network: a linear layer, a convolution or a product of attention."""

    name: str
    place: Place
    scheme: str | None = None  # of its left operand or input, where that follows from its place
    row_blocks: int = 1  # matrices that are stacked in its weight: q, k and v in qkv


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

    layer: Layer
    operands: dict[Role, OperandPlan]

    @property
    def name(self) -> str:
        return self.layer.name


def find_layers(network: nn.Module) -> tuple[Layer, ...]:
    """Every product of a DiT, in the order of its modules."""
    if not isinstance(network, DiT):
        raise UsageError(f"a {type(network).__name__} cannot be calibrated yet, only a DiT. Load one with load_model.")
    return tuple(layer for name, module in network.named_modules() for layer in _products_of(name, module))


def _products_of(name: str, module: nn.Module) -> Iterator[Layer]:
    match module:
        case Attention():
            yield Layer(f"{name}.qkv", "block", row_blocks=3)
            yield Layer(f"{name}.scores", "attention")
            yield Layer(f"{name}.value_product", "attention", scheme="softmax")
            yield Layer(f"{name}.proj", "block")
        case Mlp():
            yield Layer(f"{name}.fc1", "block")
            yield Layer(f"{name}.fc2", "block", scheme="gelu")
        case PatchEmbed():
            yield Layer(f"{name}.proj", "patch")
        case TimestepEmbedder():
            yield Layer(f"{name}.mlp.0", "conditioning")
            yield Layer(f"{name}.mlp.2", "conditioning")
        case DiTBlock():
            yield Layer(f"{name}.adaLN_modulation.1", "conditioning")
        case FinalLayer():
            yield Layer(f"{name}.linear", "final")
            yield Layer(f"{name}.adaLN_modulation.1", "conditioning")


def plan(network: nn.Module, config: QuantizationConfig) -> tuple[LayerPlan, ...]:
    """The products that `config` quantizes."""
    layers = find_layers(network)
    unknown = set(config.layer_knobs) - {layer.name for layer in layers}
    if unknown:
        raise UsageError(f"--overrides names '{min(unknown)}', which is no layer of this model. Name one such as "
                         f"'{layers[-1].name}'.")  # fmt: skip
    plans = (
        _plan_layer(network.get_submodule(layer.name), layer, config.for_layer(layer.name)) for layer in layers
    )  # fmt: skip
    return tuple(layer_plan for layer_plan in plans if layer_plan.operands)


def _plan_layer(module: nn.Module, layer: Layer, config: QuantizationConfig) -> LayerPlan:
    if layer.place == "attention":
        if not config.attention:
            return LayerPlan(layer, {})
        right = OperandPlan("symmetric", config.activation_bits, _groups(config, "symmetric"))
        return LayerPlan(layer, {"left": _left(layer, config), "right": right})
    parts: dict[Place, str] = {
        "block": "all", "patch": config.patch, "final": config.final, "conditioning": config.conditioning
    }  # fmt: skip
    least = 2 if layer.place == "block" else config.outer_bits
    operands: dict[Role, OperandPlan] = {}
    if parts[layer.place] != "none":
        assert isinstance(module, nn.Linear | nn.Conv2d)
        scales = module.weight.shape[0] if config.weight_granularity == "channel" else layer.row_blocks
        operands["weight"] = OperandPlan("symmetric", max(least, config.weight_bits), scales)
    if parts[layer.place] == "all":
        operands["input"] = _input(layer, config, max(least, config.activation_bits))
    return LayerPlan(layer, operands)


def _left(layer: Layer, config: QuantizationConfig) -> OperandPlan:
    groups = _groups(config, layer.scheme or "symmetric")
    if layer.scheme != "softmax" or config.softmax == "uniform":
        return OperandPlan("symmetric", config.activation_bits, groups)
    return OperandPlan("softmax", config.activation_bits, groups, {"top": config.softmax_top})


def _input(layer: Layer, config: QuantizationConfig, bits: int) -> OperandPlan:
    scheme = "gelu" if layer.scheme == "gelu" and config.gelu != "uniform" else config.inputs
    return OperandPlan(scheme, bits, _groups(config, scheme))


def with_one_region(layer_plan: LayerPlan, config: QuantizationConfig) -> LayerPlan | None:
    """The same layer with one region, where `config` leaves the choice; None where it does not.

    One region of probabilities has one scale for all groups: engines then make one integer kernel of an attention.
    """
    operands = layer_plan.operands
    if config.gelu == "auto" and "input" in operands and operands["input"].scheme == "gelu":
        uniform = _input(layer_plan.layer, replace(config, gelu="uniform"), operands["input"].bits)
        return replace(layer_plan, operands={**operands, "input": uniform})
    if config.softmax == "auto" and "left" in operands and operands["left"].scheme == "softmax":
        uniform = OperandPlan("symmetric", operands["left"].bits, 1)
        return replace(layer_plan, operands={**operands, "left": uniform})
    return None


def _groups(config: QuantizationConfig, scheme: str) -> int:
    grouped = config.time_groups == "all" or (config.time_groups == "softmax" and scheme == "softmax")
    return config.groups if grouped else 1
