"""Schemes with a scale per token: their properties, tokens that are not ordinary, and what a table may say of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from support import tiny_model
from tables import Kind, make_table
from tqdit.errors import FileFormatError
from tqdit.quantization.fake_quant import RowGroups, quantize_module
from tqdit.quantization.granularity import Granularity, PerChannel, PerTensor, PerTimestepGroup, PerToken
from tqdit.quantization.quantizer import Quantizer
from tqdit.quantization.rounding import SMALLEST_SCALE
from tqdit.quantization.schemes.dynamic import Dynamic
from tqdit.quantization.schemes.dynamic_asymmetric import DynamicAsymmetric
from tqdit.quantization.schemes.symmetric import Symmetric
from tqdit.quantization.table import ScaleTable, Site, read_scale_table, write_scale_table

examples = settings(max_examples=60, deadline=None, derandomize=True)
BITS = st.integers(2, 8)
SEEDS = st.integers(0, 999)


def quantize(x: np.ndarray, bits: int, scheme: type[Quantizer] = Dynamic) -> np.ndarray:
    return scheme.fake_quantize(torch.from_numpy(x), bits, {}).numpy()


def reference(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of tokens (..., K), float32."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    scale = np.maximum(largest / np.float32(2 ** (bits - 1) - 1), np.float32(SMALLEST_SCALE))
    return np.rint(x / scale), scale


def asymmetric_reference(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scales, offsets) of tokens (..., K), float32."""
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    scale = np.maximum((high - low) / np.float32(2**bits - 1), np.float32(SMALLEST_SCALE))
    offset = low + scale * np.float32(2 ** (bits - 1))
    return np.rint((x - offset) / scale), scale, offset


def tokens(seed: int, count: int = 12, width: int = 40) -> np.ndarray:
    """Tokens whose magnitudes differ by factors of up to a thousand, each with a few outliers."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, (3, count, width)) * 10.0 ** rng.uniform(-2, 1, (3, count, 1))
    return x.astype(np.float32)


@given(BITS, SEEDS)
@examples
def test_equals_the_reference(bits: int, seed: int) -> None:
    codes, scale = reference(tokens(seed), bits)
    np.testing.assert_array_equal(quantize(tokens(seed), bits), codes * scale)
    assert np.abs(codes).max() == 2 ** (bits - 1) - 1  # the whole range, on both sides of 0, and nothing to clip


@given(BITS, SEEDS)
@examples
def test_the_error_of_each_value_is_at_most_half_its_tokens_scale(bits: int, seed: int) -> None:
    x = tokens(seed)
    _, scale = reference(x, bits)
    assert (np.abs(quantize(x, bits) - x) <= scale / 2 * (1 + 1e-4)).all()


@given(BITS, SEEDS)
@examples
def test_the_largest_value_of_a_token_is_exact(bits: int, seed: int) -> None:
    x = tokens(seed)
    place = np.abs(x).argmax(-1)[..., None]
    found, exact = (np.take_along_axis(each, place, -1) for each in (quantize(x, bits), x))
    np.testing.assert_allclose(found, exact, rtol=1e-6)


@given(BITS, SEEDS, st.integers(-60, 60))
@examples
def test_a_power_of_two_goes_through(bits: int, seed: int, exponent: int) -> None:
    """quantize(c x) = c quantize(x), to the last bit."""
    x, factor = tokens(seed), np.float32(2.0**exponent)
    np.testing.assert_array_equal(quantize(x * factor, bits), quantize(x, bits) * factor)


@given(BITS, SEEDS)
@examples
def test_the_sign_goes_through(bits: int, seed: int) -> None:
    np.testing.assert_array_equal(quantize(-tokens(seed), bits), -quantize(tokens(seed), bits))


@given(BITS, SEEDS)
@examples
def test_quantizing_twice_changes_nothing_but_the_last_bit(bits: int, seed: int) -> None:
    once = quantize(tokens(seed), bits)
    np.testing.assert_allclose(quantize(once, bits), once, rtol=1e-6)


@given(BITS, SEEDS)
@examples
def test_a_token_does_not_depend_on_the_others(bits: int, seed: int) -> None:
    x = tokens(seed)
    together = quantize(x, bits)
    changed = x.copy()
    changed[0], changed[2] = 1e6, np.nan
    np.testing.assert_array_equal(quantize(x[1, 3:4], bits), together[1, 3:4])
    np.testing.assert_array_equal(quantize(changed, bits)[1], together[1])


@pytest.mark.parametrize("bits", [2, 6, 8])
def test_tokens_without_a_normal_scale_become_zero(bits: int) -> None:
    x = np.zeros((3, 8), np.float32)
    x[1], x[2] = 1e-42, SMALLEST_SCALE / 4
    assert quantize(x, bits).tolist() == np.zeros((3, 8)).tolist()


@pytest.mark.parametrize("bits", [2, 6, 8])
def test_the_largest_float32_is_quantized_like_any_other(bits: int) -> None:
    x = np.array([[3.4e38, -1.7e38, 1.0, 0.0]], np.float32)
    found = quantize(x, bits)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0, 0], x[0, 0], rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_spoils_itself_alone(value: float) -> None:
    x = tokens(0)
    x[1, 2, 3] = value
    layer, site = nn.Linear(40, 5).requires_grad_(False), Site("m", "input", Dynamic(8, PerToken()))
    weight = Site("m", "weight", Symmetric(8, PerTensor(), np.array(0.01, np.float32)))
    y = quantize_module("m", layer, {"input": site, "weight": weight}, RowGroups())(torch.from_numpy(x)).numpy()
    assert not np.isfinite(y[1, 2]).any()
    y[1, 2] = 0
    assert np.isfinite(y).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_multiplies_the_integers_and_then_the_scale(bits: int) -> None:
    layer = nn.Linear(40, 5).requires_grad_(False)
    scale = np.linspace(0.005, 0.01, 5, dtype=np.float32)
    sites = {"input": Site("m", "input", Dynamic(bits, PerToken())),
             "weight": Site("m", "weight", Symmetric(8, PerChannel(0), scale))}  # fmt: skip
    x = tokens(1)
    y = quantize_module("m", layer, sites, RowGroups())(torch.from_numpy(x)).numpy()
    codes, of_tokens = reference(x, bits)
    weight = np.clip(np.rint(layer.weight.numpy() / scale[:, None]), -128, 127).astype(np.float64)
    expected = of_tokens * (codes.astype(np.float64) @ weight.T) * scale + layer.bias.numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


# asymmetric -----------------------------------------------------------------------------------------------------------


@given(BITS, SEEDS)
@examples
def test_an_asymmetric_scheme_equals_its_reference(bits: int, seed: int) -> None:
    x = tokens(seed)
    codes, scale, offset = asymmetric_reference(x, bits)
    np.testing.assert_array_equal(quantize(x, bits, DynamicAsymmetric), codes * scale + offset)
    assert (codes.min(), codes.max()) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)  # nothing to clip
    error = np.abs(codes.astype(np.float64) * scale + offset - x)
    assert (error <= scale / 2 + 1e-6 * np.abs(x).max(-1, keepdims=True)).all()


@given(BITS, SEEDS)
@examples
def test_values_on_one_side_have_twice_the_codes(bits: int, seed: int) -> None:
    x = np.abs(tokens(seed))
    _, scale = reference(x, bits)
    _, finer, _ = asymmetric_reference(x, bits)
    assert (finer <= scale * (2 ** (bits - 1) - 1) / (2**bits - 1) * (1 + 1e-5)).all()


@given(BITS, SEEDS, st.integers(-60, 60))
@examples
def test_a_power_of_two_goes_through_an_asymmetric_scheme(bits: int, seed: int, exponent: int) -> None:
    x, factor = tokens(seed), np.float32(2.0**exponent)
    found = quantize(x * factor, bits, DynamicAsymmetric)
    np.testing.assert_array_equal(found, quantize(x, bits, DynamicAsymmetric) * factor)


@pytest.mark.parametrize("bits", [2, 8])
def test_a_token_of_one_value_is_exact(bits: int) -> None:
    x = np.repeat(np.array([[0.0], [0.3], [-7.5], [1e30]], np.float32), 6, axis=1)
    np.testing.assert_allclose(quantize(x, bits, DynamicAsymmetric), x, rtol=1e-6)


def test_an_asymmetric_layer_adds_the_row_sums_of_its_weight() -> None:
    layer = nn.Linear(40, 5).requires_grad_(False)
    scale = np.linspace(0.005, 0.01, 5, dtype=np.float32)
    sites = {"input": Site("m", "input", DynamicAsymmetric(6, PerToken())),
             "weight": Site("m", "weight", Symmetric(8, PerChannel(0), scale))}  # fmt: skip
    x = tokens(2) + 3
    y = quantize_module("m", layer, sites, RowGroups())(torch.from_numpy(x)).numpy()
    codes, of_tokens, offset = asymmetric_reference(x, 6)
    weight = np.clip(np.rint(layer.weight.numpy() / scale[:, None]), -128, 127) * scale[:, None]
    expected = (codes * of_tokens + offset).astype(np.float64) @ weight.T.astype(np.float64) + layer.bias.numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


# the scale table ------------------------------------------------------------------------------------------------------


def test_a_table_holds_its_bits_and_nothing_else(tmp_path: Path) -> None:
    table = make_table(tiny_model(), Kind(activation_bits=6, dynamic=True))
    write_scale_table(tmp_path / "scales.safetensors", table)
    read = read_scale_table(tmp_path / "scales.safetensors")
    assert read == table
    found = [site for site in read.sites if site.quantizer.scheme == "dynamic"]
    assert {site.module.rpartition(".")[2] for site in found} == {"proj", "qkv", "fc1", "fc2", "linear"}
    assert {(site.quantizer.bits, site.quantizer.granularity) for site in found} == {(6, PerToken())}
    assert all(site.arrays() == {} for site in found)


SCALE = np.array(0.1, np.float32)


@pytest.mark.parametrize(
    ("site", "words"),
    [
        (Site("m", "weight", Dynamic(8, PerToken())), "m.weight' has scheme 'dynamic', which its role"),
        (Site("m", "right", Dynamic(8, PerToken())), "m.right' has scheme 'dynamic', which its role"),
        (Site("m", "input", Dynamic(9, PerToken())), "m.input' has 9 bits, expected 2..8"),
        (Site("m", "input", Dynamic(1, PerToken())), "m.input' has 1 bits, expected 2..8"),
        (Site("m", "input", Symmetric(8, PerToken(), SCALE)), "m.input' has granularity PerToken"),
        (Site("m", "weight", Symmetric(8, PerToken(), SCALE)), "m.weight' has granularity PerToken"),
    ],
)
def test_a_table_refuses_what_does_not_fit(site: Site, words: str) -> None:
    with pytest.raises(FileFormatError, match=words):
        ScaleTable("tiny", "f" * 64, np.zeros(0), (site,), 0, 1.5)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerTimestepGroup(1)])
def test_a_scale_that_is_not_stored_has_no_other_granularity(granularity: Granularity) -> None:
    table = make_table(tiny_model(), Kind())
    with pytest.raises(FileFormatError, match=f"m.input' has granularity {type(granularity).__name__}"):
        replace(table, sites=(Site("m", "input", Dynamic(8, granularity)),))
