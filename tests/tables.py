"""Scale tables for tiny models from the ranges of a few rows: plausible numbers without a search."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tqdit.quantization.granularity import PerChannel, PerTensor, PerTimestepGroup, PerToken
from tqdit.quantization.schemes.asymmetric import Asymmetric
from tqdit.quantization.schemes.asymmetric_bits import AsymmetricBits
from tqdit.quantization.schemes.dynamic import Dynamic
from tqdit.quantization.schemes.dynamic_asymmetric import DynamicAsymmetric
from tqdit.quantization.schemes.softmax_numerator import SoftmaxNumerator
from tqdit.quantization.schemes.symmetric import Symmetric
from tqdit.quantization.schemes.symmetric_bits import SymmetricBits
from tqdit.quantization.schemes.two_region_gelu import TwoRegionGelu
from tqdit.quantization.schemes.two_region_softmax import TwoRegionSoftmax
from tqdit.quantization.table import ScaleTable, Site, even_boundaries

if TYPE_CHECKING:
    from tqdit.models.loaded import LoadedModel
    from tqdit.ports import Signature


@dataclass(frozen=True)
class Kind:
    """One variant of quantization."""

    weight_bits: int = 8
    activation_bits: int = 8
    asymmetric: bool = False
    groups: int = 1
    everywhere: bool = False  # time groups on every activation, not on the softmax alone
    conditioning_inputs: bool = False
    uniform_softmax: bool = False  # one scale for probabilities
    numerators: bool = False  # two regions of numerators
    equalised: bool = False  # inputs of linear layers have divisors
    dynamic: bool = False  # inputs have a scale per token
    group_bits: bool = False  # inputs have bits of their own in each group


def make_table(
    model: LoadedModel, whole: Kind, seed: int = 0, operands: dict[str, tuple[np.ndarray, ...]] | None = None
) -> ScaleTable:
    """A table from the ranges of `operands` (module -> its inputs), recorded on a few rows by default."""
    import torch

    from tqdit.models.products import is_linear
    from tqdit.quantization.fold import fold_divisors

    rng = np.random.default_rng(seed)
    divisors: dict[str, np.ndarray] = {}
    if whole.equalised:
        assert operands is None
        divisors = {
            product.name: rng.uniform(0.5, 2, model.network.get_submodule(product.name).in_features).astype(np.float32)
            for product in model.products
            if product.folds
        }
        model = fold_divisors(model, {name: torch.from_numpy(divisor) for name, divisor in divisors.items()})
    operands = operands or record_operands(model)
    sites = []
    for product in model.products:
        name, module = product.name, model.network.get_submodule(product.name)
        if name not in operands or not (product.place == "attention" or is_linear(module)):
            continue
        values, kind = operands[name], replace(whole, groups=1) if product.folded else whole
        if product.place == "attention":
            left = symmetric(values[0], kind, rng)
            if product.made_by == "softmax" and not kind.uniform_softmax:
                left = softmax(kind, rng)
            sites += [Site(name, "left", left), Site(name, "right", symmetric(values[1], kind, rng))]
            continue
        weight = model.weights.read(module.weight).numpy()
        largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
        scale = (largest / (2 ** (kind.weight_bits - 1) - 0.5)).astype(np.float32)
        sites.append(Site(name, "weight", Symmetric(kind.weight_bits, PerChannel(0), scale)))
        if product.place == "conditioning" and not kind.conditioning_inputs:
            continue
        if kind.dynamic:
            quantizer = (DynamicAsymmetric if kind.asymmetric else Dynamic)(kind.activation_bits, PerToken())
        elif product.made_by == "gelu":
            quantizer = gelu(values[0], kind, rng)
        else:
            quantizer = (asymmetric if kind.asymmetric else symmetric)(values[0], kind, rng)
            if kind.group_bits:
                quantizer = with_group_bits(quantizer, rng)
        sites.append(Site(name, "input", quantizer, divisor=divisors.get(name)))
    span = model.sampling.process.span
    if model.signature.time.dtype == "int64":
        span = int(span[0]), int(span[1])
    return ScaleTable(
        model=model.source, fingerprint=model.fingerprint, boundaries=even_boundaries(whole.groups, span),
        sites=tuple(sites), seed=seed, guidance_scale=1.5,
    )  # fmt: skip


def record_operands(model: LoadedModel) -> dict[str, tuple[np.ndarray, ...]]:
    """Inputs of every product on a few random rows."""
    import torch

    recorded: dict[str, tuple[np.ndarray, ...]] = {}
    hooks = []
    for product in model.products:

        def hook(_module, inputs, _output, name=product.name):
            recorded[name] = tuple(each.numpy() for each in inputs)

        hooks.append(model.network.get_submodule(product.name).register_forward_hook(hook))
    rows = random_rows(model.signature, 8, last=0.98 * model.sampling.process.span[1])
    with torch.no_grad():
        model.call({name: torch.from_numpy(array) for name, array in rows.items()})
    for each in hooks:
        each.remove()
    return recorded


def random_rows(signature: Signature, rows: int, seed: int = 0, last: float = 980) -> dict[str, np.ndarray]:
    """Inputs of a network call: timesteps evenly from 0 to `last`, anything else random."""
    rng = np.random.default_rng(seed)
    inputs = signature.zeros(rows)
    for port in signature.ports:
        if port.kind == "time":
            values = np.linspace(0, last, rows)
        elif port.values is not None:
            values = rng.integers(0, port.values, inputs[port.name].shape)
        else:
            values = rng.standard_normal(inputs[port.name].shape)
        inputs[port.name] = values.astype(port.dtype)
    return inputs


def spread(value: float, kind: Kind, rng: np.random.Generator) -> tuple[np.ndarray, PerTensor | PerTimestepGroup]:
    """One scale, or one per group that wanders by a factor of up to two."""
    if not kind.everywhere or kind.groups == 1:
        return np.float32(value).reshape(()), PerTensor()
    return (value * rng.uniform(0.5, 1, kind.groups)).astype(np.float32), PerTimestepGroup(kind.groups)


def symmetric(x: np.ndarray, kind: Kind, rng: np.random.Generator) -> Symmetric:
    bits = kind.activation_bits
    scale, granularity = spread(np.abs(x).max() / (2 ** (bits - 1) - 0.5), kind, rng)
    return Symmetric(bits, granularity, scale)


def asymmetric(x: np.ndarray, kind: Kind, rng: np.random.Generator) -> Asymmetric:
    bits = kind.activation_bits
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale, granularity = spread((high - low) / (2**bits - 1), kind, rng)
    zero = np.clip(np.round(-low / scale), 0, 2**bits - 1).astype(np.int32)
    return Asymmetric(bits, granularity, scale, zero.reshape(scale.shape))


def with_group_bits(quantizer: Symmetric | Asymmetric, rng: np.random.Generator) -> SymmetricBits | AsymmetricBits:
    """The same ranges with 3 to 8 bits in each group."""
    bits = rng.integers(3, 9, quantizer.scale.shape).astype(np.int32)
    steps = (2.0**quantizer.bits - 1) / (2.0**bits - 1)
    scale, given = (quantizer.scale * steps).astype(np.float32), (quantizer.bits, quantizer.granularity)
    if isinstance(quantizer, Symmetric):
        return SymmetricBits(*given, scale, bits)
    zero = np.round(quantizer.zero_point / steps).astype(np.int32)
    return AsymmetricBits(*given, scale, zero, bits)


def gelu(x: np.ndarray, kind: Kind, rng: np.random.Generator) -> TwoRegionGelu:
    bits = kind.activation_bits
    q = 2 ** (bits - 1)
    negative, granularity = spread(0.17 / q, kind, rng)
    positive, _ = spread(x.max() / (q - 0.5), kind, rng)
    return TwoRegionGelu(bits, granularity, negative, positive)


def softmax(kind: Kind, rng: np.random.Generator) -> TwoRegionSoftmax:
    bits = kind.activation_bits
    high = np.float32(1 / (2 ** (bits - 1) - 1))
    shape = () if kind.groups == 1 else (kind.groups,)
    low = (high * 2.0 ** -rng.integers(1, bits, shape)).astype(np.float32).reshape(shape)
    granularity = PerTensor() if kind.groups == 1 else PerTimestepGroup(kind.groups)
    scheme = SoftmaxNumerator if kind.numerators else TwoRegionSoftmax
    return scheme(bits, granularity, low, high.reshape(()))
