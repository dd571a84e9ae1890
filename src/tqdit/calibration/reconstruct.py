"""Phase 4 of the method `reconstruct`: block by block, rounding of weights and scales of activations are learned.

A block of the fake-quantized network takes the inputs that the quantized blocks before it give, and is trained to
give what the float block gives (BRECQ, arXiv 2102.05426; Q-Diffusion, 2302.04304; PTQ4DiT, 2405.16005). Whether a
weight is rounded down or up is a rectified sigmoid of a free variable that a growing penalty drives to 0 or 1
(AdaRound, 2004.10568); the scales of an activation are multiplied with a factor that gets gradients through the
rounding (LSQ, 1902.08153). What is found is kept if it lowers the block's error; weights go on as codes, as those of
GPTQ do.

A unit is a block, or a product outside of the blocks: its network call is replayed with tensors in place of weights and
scales, so what is learned on is what an export computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tqdit.calibration.capture import kept_bytes
from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.operands import array
from tqdit.calibration.rows import CalibrationRows
from tqdit.calibration.work import WorkFolder
from tqdit.models.blocks import block_names
from tqdit.models.loaded import LoadedModel
from tqdit.quantization.fake_quant import QuantizedLinear, QuantizedNetwork, QuantizedOperand, apply, weight_scale
from tqdit.quantization.fold import fold
from tqdit.quantization.quantizer import Quantizer
from tqdit.quantization.rounding import code_range
from tqdit.quantization.table import ScaleTable, Site

LOWEST, HIGHEST = -0.1, 1.1  # gamma and zeta of the rectified sigmoid
SHARPEST, FLATTEST = 20.0, 2.0  # the penalty's exponent, from the end of the warm-up to the end
WARM_UP = 0.2  # of the iterations, without a penalty
PENALTY = 2000.0  # of the mean over weights, beside the error relative to that of rounding to nearest
ROUNDING_RATE, SCALE_RATE = 1e-3, 4e-5  # Adam's, at PAPER_ITERATIONS; with fewer as many times larger
PAPER_ITERATIONS = 20_000
BATCH = 16  # rows of an iteration
GRAPH_BYTES = 2**30  # of what autograd keeps of them
RECORDED_BYTES = 2**31  # of the calls of one unit


@dataclass(frozen=True)
class Unit:
    """A block, or a product outside of the blocks, by the name of its module; products: those in it."""

    name: str
    products: tuple[str, ...]


@dataclass(frozen=True)
class UnitCall:
    """What a unit of the quantized network is called with in one batch, and the tensors that the float unit returns."""

    group: Tensor  # (N,) of each row of the batch
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    target: list[Tensor]

    def error(self, output: Any) -> Tensor:
        """The mean squared difference of all elements."""
        squares = [(a - b).square().sum() for a, b in zip(floats(output), self.target, strict=True)]
        return torch.stack(squares).sum() / sum(tensor.numel() for tensor in self.target)


def units_of(model: LoadedModel, table: ScaleTable) -> list[Unit]:
    """In the order of the network's calls."""
    blocks = block_names(model.network)
    found: dict[str, list[str]] = {}
    for product in table.by_module:
        owner = next((block for block in blocks if product.startswith(f"{block}.")), product)
        found.setdefault(owner, []).append(product)
    return [Unit(name, tuple(products)) for name, products in found.items()]


def reconstruct(
    model: LoadedModel, table: ScaleTable, rows: CalibrationRows, config: QuantizationConfig, folder: WorkFolder,
    per_row: Mapping[str, int], done: Callable[[float], object],
) -> ScaleTable:  # fmt: skip
    """The table with weights rounded and scales moved, unit after unit; one that `folder` holds is not learned again.

    per_row: multiply-adds of each product. done: called after each unit with those that it took.
    """
    passed = 0  # multiply-adds of one row up to the unit's end
    floats_of, plain = fold(model, table)
    batch = _rows_per_batch(floats_of, rows)
    for unit in units_of(floats_of, plain):
        part, learned = f"unit-{unit.name}", None
        own = sum(per_row[product] for product in unit.products)
        passed += own
        if not folder.has(part):
            sites, learned = reconstruct_unit(floats_of, apply(model, table), table, unit, rows, config, batch)
            folder.save_table(part, replace(table, sites=sites, errors={}))
        found = {site.name: site for site in folder.load_table(part).sites}
        table = replace(table, sites=tuple(found.get(site.name, site) for site in table.sites))
        done(0 if learned is None else 2 * len(rows) * (passed + own) + 3 * learned * own)
    return table


def _rows_per_batch(model: LoadedModel, rows: CalibrationRows) -> int:
    of_block = kept_bytes(model, rows.inputs) // (len(block_names(model.network)) or 1)
    return max(1, min(BATCH, GRAPH_BYTES // max(1, of_block)))


def reconstruct_unit(
    model: LoadedModel, quantized: LoadedModel, table: ScaleTable, unit: Unit, rows: CalibrationRows,
    config: QuantizationConfig, batch: int,
) -> tuple[tuple[Site, ...], int]:  # fmt: skip
    """The sites of a unit, and the rows of all iterations. model: the float network, folded as the table says."""
    network = quantized.network
    assert isinstance(network, QuantizedNetwork)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(rows), generator=generator)
    calls = record(model, quantized, unit, rows, list(torch.split(order, batch)))
    replay = Replay(network, unit, quantized)
    sites = [site for product in unit.products for site in table.by_module[product].values()]
    before = replay.error(calls, {})
    learned = Learned(model, network, unit, {site.name: site for site in sites})
    if not before > 0 or not (learned.roundings or learned.factors):
        return tuple(sites), 0
    faster, count = PAPER_ITERATIONS / config.iterations, 0
    optimizer = torch.optim.Adam([
        {"params": learned.roundings, "lr": faster * ROUNDING_RATE},
        {"params": learned.factors, "lr": faster * SCALE_RATE},
    ])  # fmt: skip
    for iteration, index in zip(range(config.iterations), _endless(len(calls), generator), strict=False):
        call, share = calls[index], iteration / config.iterations
        optimizer.param_groups[1]["lr"] = faster * SCALE_RATE * (1 + math.cos(math.pi * share)) / 2
        optimizer.zero_grad()
        with torch.enable_grad():
            error = call.error(replay(call, learned.tensors())) / before
            (error + learned.penalty(share)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        count += len(call.group)
    after = replay.error(calls, learned.tensors(hard=True))
    return (tuple(map(learned.site, sites)) if after < before else tuple(sites)), count


def _endless(count: int, generator: torch.Generator) -> Iterator[int]:
    """0..count - 1 in a random order, again and again."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


# what a unit is called with ------------------------------------------------------------------------------------------


class _EnoughError(Exception):
    """Every call of the unit was recorded: the network call can end."""


@torch.no_grad()
def _listen(
    model: LoadedModel, module: nn.Module, inputs: dict[str, Tensor], most: int | None
) -> list[tuple[Any, Any, list[Tensor]]]:
    """(args, kwargs, float tensors of the output) of each call of `module` in one call of the network.

    most: after how many of its calls the network need not go on.
    """
    arguments: list[tuple[Any, Any]] = []
    found: list[tuple[Any, Any, list[Tensor]]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        arguments.append(tree_map_only(Tensor, torch.clone, (args, kwargs)))  # which the unit may change in place

    def after(_: nn.Module, __: Any, output: Any) -> None:
        found.append((*arguments.pop(), [tensor.clone() for tensor in floats(output)]))
        if len(found) == most:
            raise _EnoughError

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)
    ]  # fmt: skip
    try:
        with suppress(_EnoughError), model.weights.lent():
            model.network(**model.arguments(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return found


def record(
    model: LoadedModel, quantized: LoadedModel, unit: Unit, rows: CalibrationRows, batches: list[Tensor]
) -> list[UnitCall]:
    """The calls of a unit on batches of row numbers, as many of them as RECORDED_BYTES hold."""
    calls: list[UnitCall] = []
    inner = quantized.network.network
    assert isinstance(inner, nn.Module)
    networks = (model, model.network), (quantized, inner)
    most: int | None = None  # calls of the unit in one of the network
    for index in batches:
        index = index.to(rows.group.device)
        inputs = {name: tensor[index] for name, tensor in rows.inputs.items()}
        targets, found = (_listen(each, network.get_submodule(unit.name), inputs, most) for each, network in networks)
        most = len(found)
        calls += [
            UnitCall(rows.group[index], (args, kwargs), target)
            for (args, kwargs, _), (_, _, target) in zip(found, targets, strict=True)
        ]
        size = sum(tensor.nbytes for call in calls for tensor in tree_leaves((call.arguments, call.target))
                   if isinstance(tensor, Tensor))  # fmt: skip
        if size + size // len(calls) > RECORDED_BYTES:
            break
    return calls


def floats(output: Any) -> list[Tensor]:
    """The float tensors of a module's output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


class StraightThrough(TorchFunctionMode):
    """Inside, rounding passes gradients on as they come."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.round_:
            return args[0] + (args[0].detach().round() - args[0].detach())
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Replay:
    """Calls of a unit of the fake-quantized network with other weights and scales."""

    network: QuantizedNetwork
    unit: Unit
    model: LoadedModel

    def __call__(self, call: UnitCall, tensors: Mapping[str, Tensor]) -> Any:
        """tensors: by name in the unit, in place of those that it holds."""
        args, kwargs = tree_map_only(Tensor, torch.clone, call.arguments)
        module = self.network.network.get_submodule(self.unit.name)
        with self.network.rows.set(call.group), self.model.weights.lent(), StraightThrough():
            return functional_call(module, dict(tensors), args, kwargs)

    @torch.no_grad()
    def error(self, calls: list[UnitCall], tensors: Mapping[str, Tensor]) -> float:
        """The mean over all calls."""
        total = sum(float(call.error(self(call, tensors))) * len(call.group) for call in calls)
        return total / sum(len(call.group) for call in calls)


# what is learned -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rounding:
    """A weight W whose codes are floor(W / s) or one more: `up` is the variable that decides."""

    floor: Tensor
    scale: Tensor
    bits: int
    up: Tensor

    @classmethod
    def of(cls, weight: Tensor, site: Site) -> Rounding:
        """Begins where the soft codes are W / s itself."""
        scale = weight_scale(weight.shape, site).to(weight.device)
        exact = weight / scale
        share = (exact - exact.floor()).clamp(1e-4, 1 - 1e-4)
        up = -torch.log((HIGHEST - LOWEST) / (share - LOWEST) - 1)
        return cls(exact.floor(), scale, site.quantizer.bits, up.requires_grad_())

    @property
    def soft(self) -> Tensor:
        """h in 0..1: the rectified sigmoid."""
        return (torch.sigmoid(self.up) * (HIGHEST - LOWEST) + LOWEST).clamp(0, 1)

    def codes(self, share: Tensor) -> Tensor:
        return (self.floor + share).clamp(*code_range(self.bits))

    @property
    def hard_codes(self) -> Tensor:
        return self.codes((self.up.detach() >= 0).float())


class Learned:
    """The variables of one unit, and the tensors that they stand for."""

    def __init__(self, model: LoadedModel, network: QuantizedNetwork, unit: Unit, sites: Mapping[str, Site]) -> None:
        self._weights: dict[str, tuple[str, Rounding]] = {}  # site -> name in the unit
        self._operands: dict[str, tuple[str, QuantizedOperand, Tensor]] = {}  # with the logarithm of the factor
        for product in unit.products:
            module = network.network.get_submodule(product)
            name = product.removeprefix(unit.name).removeprefix(".")
            name += "." * bool(name)
            weight = sites.get(f"{product}.weight")
            if isinstance(module, QuantizedLinear) and weight is not None:
                values = model.weight(product)
                assert values is not None
                self._weights[weight.name] = name, Rounding.of(values, weight)
            operands = {"input": "quantize", "left": "left", "right": "right"}
            for role, attribute in operands.items():
                operand = getattr(module, attribute, None)
                if isinstance(operand, QuantizedOperand) and _has_scales(operand.quantizer):
                    like = operand.get_buffer(f"held_{next(iter(operand.quantizer.tensors))}")
                    self._operands[f"{product}.{role}"] = (
                        f"{name}{attribute}.", operand, torch.zeros_like(like).requires_grad_()
                    )  # fmt: skip

    @property
    def roundings(self) -> list[Tensor]:
        return [rounding.up for _, rounding in self._weights.values()]

    @property
    def factors(self) -> list[Tensor]:
        return [factor for _, _, factor in self._operands.values()]

    def penalty(self, share: float) -> Tensor:
        """PENALTY times the mean of 1 - |2 h - 1|^b over the weights; 0 during the warm-up."""
        if share < WARM_UP or not self._weights:
            return torch.zeros(())
        exponent = FLATTEST + (SHARPEST - FLATTEST) * (1 - (share - WARM_UP) / (1 - WARM_UP))
        undecided = [1 - (2 * rounding.soft - 1).abs().pow(exponent) for _, rounding in self._weights.values()]
        return PENALTY * torch.cat([each.flatten() for each in undecided]).mean()

    def tensors(self, hard: bool = False) -> dict[str, Tensor]:
        """By name in the unit; hard: with every weight rounded, as the table will have it."""
        found: dict[str, Tensor] = {}
        for name, rounding in self._weights.values():
            weight = (rounding.hard_codes if hard else rounding.codes(rounding.soft)) * rounding.scale
            found |= {f"{name}weight": weight, f"{name}row_sums": weight.flatten(1).sum(1)}
        for name, operand, factor in self._operands.values():  # s = s_ref r: the factor goes to r
            found |= {
                f"{name}{buffer}": held * factor.exp()
                for buffer, held in operand.named_buffers() if not buffer.endswith("_reference")
            }  # fmt: skip
        return found

    def site(self, site: Site) -> Site:
        """As it is after learning."""
        if site.name in self._weights:
            codes = self._weights[site.name][1].hard_codes
            return replace(site, codes=codes.to(torch.int8).cpu().numpy())
        if site.name not in self._operands:
            return site
        factor = np.exp(array(self._operands[site.name][2]))
        scaled: dict[str, Any] = {
            name: np.asarray(tensor * factor, np.float32)
            for name, tensor in site.quantizer.arrays().items() if tensor.dtype == np.float32
        }  # fmt: skip
        return replace(site, quantizer=replace(site.quantizer, **scaled))


def _has_scales(quantizer: Quantizer) -> bool:
    """Whether its scales can take any value: not those found while the network runs, nor powers of two of softmax."""
    return bool(quantizer.tensors) and quantizer.softmax is None
