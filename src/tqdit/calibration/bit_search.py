"""Bits of each layer's input in each group of timesteps (`--bit-search`): AdaTSQ's allocation, arXiv 2602.09883.

Every layer of a block gets high, mid or low bits in each group, at most `activation_bits` in the mean. Errors of one
layer in one group are those of its own product (eq. 15), which add up. A beam search goes through the groups in order
of time and keeps the Pareto front of (error, bits); of what ends within the budget, the best few are compared by the
error of the whole network.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqdit.calibration.capture import Capture, Samples
from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.end_to_end import EndToEnd
from tqdit.calibration.layers import LayerPlan
from tqdit.calibration.methods.search import improve
from tqdit.calibration.operands import Activation
from tqdit.calibration.problem import make_problem
from tqdit.calibration.rows import CalibrationRows
from tqdit.console import Console
from tqdit.errors import UsageError
from tqdit.quantization.granularity import PerTimestepGroup
from tqdit.quantization.quantizer import Quantizer
from tqdit.quantization.schemes import find_schemes
from tqdit.quantization.schemes.symmetric_bits import MOST_BITS
from tqdit.quantization.table import ScaleTable, Site

BEAM = 256
SURVIVORS = 8  # that the whole network compares, beside the same bits everywhere
THINNED = 4  # of the tokens of the samples, every fourth counts here

Policy = tuple[tuple[int, ...], ...]  # of each group, of each layer: a position among the choices of bits


@dataclass(frozen=True)
class BitSpace:
    """The layers whose bits are searched, by name, and the bits to choose from, in increasing order."""

    layers: dict[str, LayerPlan]
    choices: tuple[int, ...]


def choices_of_bits(config: QuantizationConfig) -> tuple[int, ...]:
    """Raises UsageError for what is no such choice."""
    mid = config.activation_bits
    text = config.bit_choices or "/".join(str(bits) for bits in (mid - 2, mid, mid + 2) if 2 <= bits <= MOST_BITS)
    try:
        choices = tuple(sorted({int(each) for each in text.split("/")}))
    except ValueError:
        choices = (0,)
    if not (2 <= choices[0] <= mid and mid in choices and choices[-1] <= MOST_BITS):
        raise UsageError(
            f"--bit-choices is '{text}'; expected numbers of 2..8 such as 4/6/8, --activation-bits {mid} among them."
        )
    return choices


def space(plans: Iterable[LayerPlan], config: QuantizationConfig) -> BitSpace:
    """Raises UsageError if the settings give no layer bits of its own in each group. Overrides take layers out."""
    if config.group_bits:
        raise UsageError("--group-bits gives all layers the same bits, --bit-search each its own. Pass one of them.")
    if "group_bits" not in find_schemes()[config.inputs].tensors:
        raise UsageError(f"--bit-search needs bits per group; --inputs is '{config.inputs}'. Pass asymmetric_bits.")
    if config.time_groups != "all":
        raise UsageError(f"--bit-search needs scales per group; --time-groups is '{config.time_groups}'. Pass all.")
    layers = {
        entry.name: entry
        for entry in plans
        if entry.layer.place == "block" and "input" in entry.operands
        and "group_bits" in entry.operands["input"].options and entry.operands["input"].scales == config.groups
        and not config.for_layer(entry.name).group_bits
    }  # fmt: skip
    choices = choices_of_bits(config)
    return BitSpace(
        layers if choices[-1] > config.activation_bits else {}, choices
    )  # all the same, if none can have more


@torch.no_grad()
def measure(
    entry: LayerPlan, samples: Samples, weight: Tensor, rows: CalibrationRows, bits: int, config: QuantizationConfig
) -> tuple[Tensor, Quantizer, int]:
    """Errors (G,) of a layer with a float weight and inputs of so many bits, their quantizer, and multiply-adds."""
    plan = entry.operands["input"]
    text = "/".join([str(bits)] * plan.scales)
    one = replace(entry, operands={"input": replace(plan, bits=bits, options={**plan.options, "group_bits": text})})
    few = replace(samples, left=samples.left[:, ::THINNED].contiguous(), g2=samples.g2[:, ::THINNED].contiguous())
    problem = make_problem(one, few, weight, rows.group, config)
    operand, parameters, spent = problem.operands["input"], problem.initial, problem.multiply_adds
    assert isinstance(operand, Activation)
    for name in operand.initial:
        parameters, _, more = improve(problem, parameters, "input", name, config.coarse, True)
        spent += more
    errors = operand.entries(problem.error(*problem.sides(parameters)))
    return errors.double().cpu(), operand.quantizer(parameters["input"]), spent


def run(
    space: BitSpace, capture: Capture, whole: EndToEnd, config: QuantizationConfig, console: Console
) -> QuantizationConfig:
    """The settings with the bits that were found. capture, whole: of the network with its divisors folded."""
    model, rows = whole.model, whole.rows
    found: dict[str, list[tuple[Tensor, Quantizer]]] = {}
    with console.bar(len(space.layers), "bits of each layer", "layers") as bar:
        for name, entry in space.layers.items():
            weight, samples = model.weight(name), capture.samples(name)
            assert weight is not None
            found[name] = []
            for bits in space.choices:
                errors, quantizer, spent = measure(entry, samples, weight, rows, bits, config)
                found[name].append((errors, quantizer))
                whole.meter.add(whole.phase, spent)
            bar.update()
    return choose(space, found, rows, whole, config)


def frontier(errors: NDArray[np.float64], choices: Sequence[int]) -> list[tuple[int, ...]]:
    """Policies of one group, errors (L, B): from the least bits on, the layer whose next choice lowers the error most
    for its bits goes first."""
    policy = [0] * len(errors)
    found = [tuple(policy)]
    while True:
        gains = [
            ((errors[layer, at] - errors[layer, after]) / (choices[after] - choices[at]), layer, after)
            for layer, at in enumerate(policy)
            for after in range(at + 1, len(choices))
        ]
        if not gains:
            return found
        _, layer, after = max(gains, key=lambda gain: (gain[0], -gain[1], -gain[2]))
        policy[layer] = after
        found.append(tuple(policy))


def beam(errors: NDArray[np.float64], choices: Sequence[int], budget: float) -> list[Policy]:
    """Policies within `budget` bits in the mean, best first; errors (G, L, B) of group, layer and choice."""
    groups, layers, _ = errors.shape
    states: list[tuple[int, float, Policy]] = [(0, 0.0, ())]
    for group in range(groups):
        steps = [
            (sum(choices[at] for at in policy), float(errors[group, np.arange(layers), policy].sum()), policy)
            for policy in frontier(errors[group], choices)
        ]
        extended = [
            (bits + more, error + added, (*path, policy))
            for (bits, error, path), (more, added, policy) in itertools.product(states, steps)
        ]
        states = thinned(pareto(extended), BEAM)
    within = [state for state in states if state[0] <= budget * groups * layers]
    return [path for _, _, path in sorted(within, key=lambda state: state[1])]


def pareto(states: Iterable[tuple[int, float, Policy]]) -> list[tuple[int, float, Policy]]:
    """Those that no other one beats in bits and error, in increasing order of bits."""
    kept: list[tuple[int, float, Policy]] = []
    for state in sorted(states, key=lambda state: state[:2]):
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept


def thinned(states: list[tuple[int, float, Policy]], most: int) -> list[tuple[int, float, Policy]]:
    """At most `most` of them, evenly over the list, with both ends."""
    if len(states) <= most:
        return states
    return [states[at] for at in np.linspace(0, len(states) - 1, most).round().astype(int)]


def choose(
    space: BitSpace, found: dict[str, list[tuple[Tensor, Quantizer]]], rows: CalibrationRows, whole: EndToEnd,
    config: QuantizationConfig,
) -> QuantizationConfig:  # fmt: skip
    """The settings with the bits of each layer. found: of each layer, errors and quantizer for each choice."""
    errors = np.stack([np.stack([each.numpy() for each, _ in found[name]], -1) for name in space.layers], 1)
    same = ((space.choices.index(config.activation_bits),) * len(space.layers),) * len(errors)
    policies = [
        same,
        *(each for each in beam(errors, space.choices, config.activation_bits)[:SURVIVORS] if each != same),
    ]

    def error(policy: Policy) -> float:
        sites = tuple(
            Site(name, "input", joined([quantizer for _, quantizer in found[name]], [at[layer] for at in policy]))
            for layer, name in enumerate(space.layers)
        )
        boundaries = rows.boundaries.cpu().numpy()
        return whole.error(ScaleTable(whole.model.source, whole.model.fingerprint, boundaries, sites, config.seed, 1.0))

    best = min(policies, key=error)
    return config.with_layer_knobs(
        (name, {"group_bits": "/".join(str(space.choices[at[layer]]) for at in best)})
        for layer, name in enumerate(space.layers)
    )


def joined(quantizers: Sequence[Quantizer], choices: Sequence[int]) -> Quantizer:
    """The quantizer that has, in each group, the parameters of the one that is chosen there."""
    groups = np.arange(len(choices))
    arrays = {
        name: np.stack([each.arrays()[name] for each in quantizers])[np.asarray(choices), groups]
        for name in quantizers[0].tensors
    }
    return replace(quantizers[0], granularity=PerTimestepGroup(len(choices)), **arrays)
