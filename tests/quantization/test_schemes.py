"""Properties of the schemes, and that torch rounds like references in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tqdit.quantization import rounding
from tqdit.quantization.granularity import PerTensor
from tqdit.quantization.quantizer import Quantizer
from tqdit.quantization.schemes.asymmetric import Asymmetric
from tqdit.quantization.schemes.symmetric import Symmetric
from tqdit.quantization.schemes.two_region_gelu import TwoRegionGelu
from tqdit.quantization.schemes.two_region_softmax import TwoRegionSoftmax

BITS = st.integers(2, 8)


def fake_quantize(quantizer: Quantizer, x: Tensor) -> Tensor:
    tensors = {name: torch.from_numpy(np.asarray(array, np.float32)) for name, array in quantizer.arrays().items()}
    return quantizer.fake_quantize(x, quantizer.bits, tensors)


def on_grid(x: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """s clip(round(x / s), -q, q - 1)."""
    return scale * np.clip(np.rint(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def reference(quantizer: Quantizer, x: np.ndarray) -> np.ndarray:
    """x^ in NumPy, as the formulas at the top of each scheme's file say."""
    bits, top = quantizer.bits, 2 ** (quantizer.bits - 1) - 1
    match quantizer:
        case Symmetric():
            return on_grid(x, quantizer.scale, bits)
        case Asymmetric():
            zero_point = quantizer.zero_point.astype(np.float32)
            codes = np.clip(np.rint(x / quantizer.scale) + zero_point, 0, 2**bits - 1)
            return quantizer.scale * (codes - zero_point)
        case TwoRegionGelu():
            negative = on_grid(np.minimum(x, 0), quantizer.negative_scale, bits)
            return np.where(x < 0, negative, on_grid(x, quantizer.positive_scale, bits))
        case TwoRegionSoftmax():
            code = np.rint(x / quantizer.low_scale)
            high = quantizer.high_scale * np.clip(np.rint(x / quantizer.high_scale), 0, top)
            return np.where(code <= top, quantizer.low_scale * code, high)
    raise AssertionError(f"no reference of {quantizer.scheme}")


def softmax_scales(bits: int, index: int, top: str = "exact") -> tuple[Any, Any]:
    """One of the low scales that a search tries, and the high scale."""
    fixed = TwoRegionSoftmax.fixed(bits, top=top)
    lows = TwoRegionSoftmax.candidates("low_scale", torch.zeros(1), torch.ones(1), bits, fixed)[:, 0]
    assert len(lows) == bits
    return np.asarray(lows.flip(0)[index % bits]), np.array(fixed["high_scale"], np.float32)


class Case:
    """One quantizer with its parameters, over the range in which its inputs lie."""

    def __init__(self, kind: str, bits: int, fraction: float, index: int) -> None:
        self.bits, self.q = bits, 2 ** (bits - 1)
        s1 = np.array(0.003 + 0.1 * fraction, np.float32)
        s2 = np.array(0.003 + 0.1 * (1 - fraction), np.float32)
        self.quantizer: Quantizer
        self.grid: list[Any]
        match kind:
            case "symmetric":
                self.low, self.high = -self.q * s1, (self.q - 1) * s1
                self.quantizer = Symmetric(bits, PerTensor(), s1)
                self.grid = [s1 * c for c in range(-self.q, self.q)]
            case "asymmetric":
                o = index % 2**bits
                self.low, self.high = -o * s1, (2**bits - 1 - o) * s1
                self.quantizer = Asymmetric(bits, PerTensor(), s1, np.array(o, np.int32))
                self.grid = [s1 * np.float32(c - o) for c in range(2**bits)]
            case "gelu":
                self.low, self.high = -self.q * s1, (self.q - 1) * s2
                self.quantizer = TwoRegionGelu(bits, PerTensor(), s1, s2)
                self.grid = [s1 * c for c in range(-self.q, 0)] + [s2 * c for c in range(self.q)]
            case _:
                low, high = softmax_scales(bits, index, "exact" if kind == "softmax" else "paper")
                self.low, self.high = np.float32(0) * high, high * (self.q - 1)
                self.quantizer = TwoRegionSoftmax(bits, PerTensor(), low, high)
                self.grid = [low * c for c in range(self.q)] + [high * c for c in range(self.q)]
        self.scales = (s1, s2)

    def quantize(self, x: Tensor) -> Tensor:
        return fake_quantize(self.quantizer, x)

    def inputs(self, seed: int, beyond: float = 0.0) -> Tensor:
        """Random values over the range, widened by `beyond` of it, with the grid, the ties and 0 among them."""
        low, high = float(self.low), float(self.high)
        margin = beyond * (high - low)
        values = np.random.default_rng(seed).uniform(low - margin, high + margin, 300)
        grid = np.array(sorted(self.grid))
        ties = (grid[1:] + grid[:-1]) / 2
        inside = np.concatenate([values, grid, ties, [0.0]])
        if self.low == 0:
            inside = np.clip(inside, 0, 1)  # probabilities
        return torch.from_numpy(np.sort(inside).astype(np.float32))


KINDS = ["symmetric", "asymmetric", "gelu", "softmax", "softmax of the paper"]
cases = st.builds(Case, st.sampled_from(KINDS), BITS, st.floats(0, 1), st.integers(0, 255))
examples = settings(max_examples=60, deadline=None, derandomize=True)


@given(cases, st.integers(0, 9))
@examples
def test_equals_the_reference(case: Case, seed: int) -> None:
    x = case.inputs(seed, beyond=0.5)
    np.testing.assert_array_equal(case.quantize(x).numpy(), reference(case.quantizer, x.numpy()))


@given(cases)
@examples
def test_quantizing_twice_changes_nothing(case: Case) -> None:
    once = case.quantize(case.inputs(0, beyond=0.5))
    torch.testing.assert_close(case.quantize(once), once, rtol=0, atol=0)


@given(cases)
@examples
def test_larger_inputs_never_give_smaller_values(case: Case) -> None:
    y = case.quantize(case.inputs(1, beyond=0.5))
    assert (y[1:] >= y[:-1]).all()


@given(cases)
@examples
def test_values_are_exact_grid_points_within_the_range(case: Case) -> None:
    y = case.quantize(case.inputs(2, beyond=2.0)).numpy()
    grid = np.array(sorted({np.float32(value) for value in case.grid}), dtype=np.float32)
    assert np.isin(y, grid).all()
    assert y.min() >= case.low
    assert y.max() <= case.high


@given(cases)
@examples
def test_zero_stays_zero(case: Case) -> None:
    assert case.quantize(torch.zeros(3)).tolist() == [0.0] * 3


@given(st.sampled_from(["symmetric", "asymmetric"]), BITS, st.floats(0, 1), st.integers(0, 255))
@examples
def test_the_error_is_at_most_half_a_scale(kind: str, bits: int, fraction: float, index: int) -> None:
    case = Case(kind, bits, fraction, index)
    x = case.inputs(3)
    assert ((case.quantize(x) - x).abs() <= case.scales[0] / 2 * (1 + 1e-4)).all()


@given(BITS, st.floats(0, 1))
@examples
def test_after_gelu_the_error_is_at_most_half_the_scale_of_its_region(bits: int, fraction: float) -> None:
    case = Case("gelu", bits, fraction, 0)
    x = case.inputs(4)
    error = (case.quantize(x) - x).abs()
    assert (error[x < 0] <= case.scales[0] / 2 * (1 + 1e-4)).all()
    assert (error[x >= 0] <= case.scales[1] / 2 * (1 + 1e-4)).all()


@given(BITS, st.integers(0, 7))
@examples
def test_after_softmax_the_error_is_at_most_half_the_scale_of_its_region(bits: int, index: int) -> None:
    low, high = softmax_scales(bits, index)
    p = torch.linspace(0, 1, 4097)
    error = (fake_quantize(TwoRegionSoftmax(bits, PerTensor(), low, high), p) - p).abs()
    is_low = torch.round(p / float(low)) <= 2 ** (bits - 1) - 1
    assert (error[is_low] <= low / 2 * (1 + 1e-4)).all()
    assert (error[~is_low] <= high / 2 * (1 + 1e-4)).all()


@given(BITS, st.integers(0, 7), st.sampled_from(["exact", "paper"]))
@examples
def test_each_probability_lies_in_exactly_one_region(bits: int, index: int, top: str) -> None:
    scales = (torch.from_numpy(scale) for scale in softmax_scales(bits, index, top))
    low, up = TwoRegionSoftmax.regions(torch.linspace(0, 1, 2049), bits, *scales)
    assert ((low == 0) | (up == 0)).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_finer_low_scale_than_the_last_candidate_would_not_be_monotone(bits: int) -> None:
    """Why the candidates end at i = k - 1: beyond it, values just above the low region round to 0."""
    low, high = softmax_scales(bits, bits - 1)
    p = torch.linspace(0, 1, 100_001)
    last = fake_quantize(TwoRegionSoftmax(bits, PerTensor(), low, high), p)
    beyond = fake_quantize(TwoRegionSoftmax(bits, PerTensor(), low / 2, high), p)
    assert (last.diff() >= 0).all()
    assert not (beyond.diff() >= 0).all()


def start(scheme: type[Quantizer], low: float, high: float, bits: int) -> Quantizer:
    """The range-based quantizer of a tensor between these values."""
    parameters = scheme.initial(torch.tensor([low]), torch.tensor([high]), bits, {})
    tensors = scheme.resolve(parameters, bits)
    arrays = {name: tensors[name][0].numpy().astype(dtype) for name, dtype in scheme.tensors.items()}
    return scheme(bits, PerTensor(), **arrays)


@given(BITS, st.floats(-50, 0), st.floats(0, 50))
@examples
def test_range_based_parameters_cover_the_range_and_hold_zero(bits: int, low: float, high: float) -> None:
    ends = torch.tensor([low, high], dtype=torch.float32)
    asymmetric, symmetric = start(Asymmetric, low, high, bits), start(Symmetric, low, high, bits)
    assert asymmetric.problem("x") is None  # the zero point lies on the grid
    for quantizer, share in ((asymmetric, 1.0), (symmetric, 0.5)):
        error = (fake_quantize(quantizer, ends) - ends).abs()
        assert (error <= share * float(quantizer.arrays()["scale"]) * (1 + 1e-4)).all()


def test_tensors_of_zeros_get_a_usable_scale() -> None:
    assert start(Symmetric, 0, 0, 8).arrays()["scale"] == 1
    assert start(Asymmetric, 0, 0, 8).arrays()["scale"] == 1


def test_codes_fit_their_bits() -> None:
    x: Any = torch.linspace(-1e6, 1e6, 101)
    for bits in range(2, 9):
        codes = rounding.codes(x, torch.tensor(0.1), bits)
        assert codes.min() == -(2 ** (bits - 1))
        assert codes.max() == 2 ** (bits - 1) - 1
