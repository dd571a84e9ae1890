"""Properties of the quantizers, and their equality with references of a few lines each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from tqdit.quantization import quantizers as Q

Array = NDArray[np.float32]
BITS = st.integers(2, 8)


# The definitions of docs/scale-table.md, value by value. np.rint rounds half to even.
def reference_symmetric(x: Array, s: np.float32, k: int) -> Array:
    return s * np.clip(np.rint(x / s), -(2 ** (k - 1)), 2 ** (k - 1) - 1)


def reference_asymmetric(x: Array, s: np.float32, o: int, k: int) -> Array:
    return s * (np.clip(np.rint(x / s) + o, 0, 2**k - 1) - o)


def reference_softmax(x: Array, s1: np.float32, s2: np.float32, k: int) -> Array:
    top = 2 ** (k - 1) - 1
    return np.array([s1 * c if (c := np.rint(v / s1)) <= top else s2 * np.clip(np.rint(v / s2), 0, top) for v in x])


def reference_gelu(x: Array, s1: np.float32, s2: np.float32, k: int) -> Array:
    q = 2 ** (k - 1)
    return np.array(
        [s1 * np.clip(np.rint(v / s1), -q, 0) if v < 0 else s2 * np.clip(np.rint(v / s2), 0, q - 1) for v in x]
    )


class Case:
    """One quantizer with its parameters, over the range in which its inputs lie."""

    def __init__(self, kind: str, bits: int, fraction: float, index: int) -> None:
        self.bits, self.q = bits, 2 ** (bits - 1)
        s1 = np.float32(0.003 + 0.1 * fraction)
        s2 = np.float32(0.003 + 0.1 * (1 - fraction))
        self.quantize: Callable[[Tensor], Tensor]
        self.reference: Callable[[Array], Array]
        self.grid: list[float]
        match kind:
            case "symmetric":
                self.low, self.high = -self.q * s1, (self.q - 1) * s1
                self.quantize = lambda x: Q.symmetric(x, torch.tensor(s1), bits)
                self.reference = lambda x: reference_symmetric(x, s1, bits)
                self.grid = [s1 * c for c in range(-self.q, self.q)]
            case "asymmetric":
                o = index % 2**bits
                self.low, self.high = -o * s1, (2**bits - 1 - o) * s1
                self.quantize = lambda x: Q.asymmetric(x, torch.tensor(s1), torch.tensor(float(o)), bits)
                self.reference = lambda x: reference_asymmetric(x, s1, o, bits)
                self.grid = [s1 * np.float32(c - o) for c in range(2**bits)]
            case "gelu":
                self.low, self.high = -self.q * s1, (self.q - 1) * s2
                self.quantize = lambda x: sum(Q.gelu_regions(x, torch.tensor(s1), torch.tensor(s2), bits), 0 * x)
                self.reference = lambda x: reference_gelu(x, s1, s2, bits)
                self.grid = [s1 * c for c in range(-self.q, 0)] + [s2 * c for c in range(self.q)]
            case _:
                whole = kind == "softmax"
                high = np.float32(Q.softmax_high_step(bits, whole))
                low = Q.softmax_low_steps(bits, float(high))[index % bits].numpy()
                self.low, self.high = np.float32(0), high * (self.q - 1)
                self.quantize = lambda x: sum(Q.softmax_regions(x, torch.tensor(low), torch.tensor(high), bits), 0 * x)
                self.reference = lambda x: reference_softmax(x, low, high, bits)
                self.grid = [low * c for c in range(self.q)] + [high * c for c in range(self.q)]
        self.steps = (s1, s2)

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
    np.testing.assert_array_equal(case.quantize(x).numpy(), case.reference(x.numpy()).astype(np.float32))


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
def test_the_error_is_at_most_half_a_step(kind: str, bits: int, fraction: float, index: int) -> None:
    case = Case(kind, bits, fraction, index)
    x = case.inputs(3)
    assert ((case.quantize(x) - x).abs() <= case.steps[0] / 2 * (1 + 1e-4)).all()


@given(BITS, st.floats(0, 1))
@examples
def test_after_gelu_the_error_is_at_most_half_the_step_of_its_region(bits: int, fraction: float) -> None:
    case = Case("gelu", bits, fraction, 0)
    x = case.inputs(4)
    error = (case.quantize(x) - x).abs()
    assert (error[x < 0] <= case.steps[0] / 2 * (1 + 1e-4)).all()
    assert (error[x >= 0] <= case.steps[1] / 2 * (1 + 1e-4)).all()


@given(BITS, st.integers(0, 7))
@examples
def test_after_softmax_the_error_is_at_most_half_the_step_of_its_region(bits: int, index: int) -> None:
    high = torch.tensor(Q.softmax_high_step(bits))
    low = Q.softmax_low_steps(bits, float(high))[index % bits]
    p = torch.linspace(0, 1, 4097)
    error = (sum(Q.softmax_regions(p, low, high, bits), 0 * p) - p).abs()
    is_low = torch.round(p / low) <= 2 ** (bits - 1) - 1
    assert (error[is_low] <= low / 2 * (1 + 1e-4)).all()
    assert (error[~is_low] <= high / 2 * (1 + 1e-4)).all()


@given(BITS, st.integers(0, 7), st.booleans())
@examples
def test_each_value_lies_in_exactly_one_region(bits: int, index: int, whole: bool) -> None:
    high = torch.tensor(Q.softmax_high_step(bits, whole))
    low_steps = Q.softmax_low_steps(bits, float(high))
    low, up = Q.softmax_regions(torch.linspace(0, 1, 2049), low_steps[index % bits], high, bits)
    assert ((low == 0) | (up == 0)).all()
    negative, positive = Q.gelu_regions(torch.linspace(-1, 4, 999), torch.tensor(0.01), torch.tensor(0.1), bits)
    assert ((negative == 0) | (positive == 0)).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_finer_low_step_than_the_last_candidate_would_not_be_monotone(bits: int) -> None:
    """Why the candidates end at i = k - 1: beyond it, values just above the low region round to 0."""
    high = torch.tensor(Q.softmax_high_step(bits))
    p = torch.linspace(0, 1, 100_001)
    last = sum(Q.softmax_regions(p, high * 2.0 ** -(bits - 1), high, bits), 0 * p)
    beyond = sum(Q.softmax_regions(p, high * 2.0**-bits, high, bits), 0 * p)
    assert (last.diff() >= 0).all()
    assert not (beyond.diff() >= 0).all()


@given(BITS, st.floats(-50, 0), st.floats(0, 50))
@examples
def test_range_based_parameters_cover_the_range_and_hold_zero(bits: int, low: float, high: float) -> None:
    step, zero_point = Q.asymmetric_parameters(torch.tensor(low), torch.tensor(high), bits)
    assert 0 <= zero_point <= 2**bits - 1
    ends = torch.tensor([low, high], dtype=torch.float32)
    assert ((Q.asymmetric(ends, step, zero_point, bits) - ends).abs() <= step * (1 + 1e-4)).all()
    symmetric = Q.symmetric_step(ends.abs().max(), bits)
    assert ((Q.symmetric(ends, symmetric, bits) - ends).abs() <= symmetric / 2 * (1 + 1e-4)).all()


def test_tensors_of_zeros_get_a_usable_step() -> None:
    assert Q.symmetric_step(torch.zeros(2), 8).tolist() == [1.0, 1.0]
    assert Q.asymmetric_parameters(torch.zeros(()), torch.zeros(()), 8)[0].item() == 1.0


def test_codes_fit_their_bits() -> None:
    x: Any = torch.linspace(-1e6, 1e6, 101)
    for bits in range(2, 9):
        codes = Q.symmetric_codes(x, torch.tensor(0.1), bits)
        assert codes.min() == -(2 ** (bits - 1))
        assert codes.max() == 2 ** (bits - 1) - 1
