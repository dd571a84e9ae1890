"""Two regions of the numerators of a softmax: torch equals NumPy, and the error does not grow with the sequence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from support import tiny_model
from tables import Kind, make_table
from tqdit.errors import FileFormatError
from tqdit.plugins.multi_region_numerator.reference import multi_region_numerator
from tqdit.quantization.schemes.softmax_numerator import SoftmaxNumerator
from tqdit.quantization.schemes.two_region_softmax import TwoRegionSoftmax
from tqdit.quantization.table import read_scale_table, write_scale_table

HIGH = float(np.float32(1 / 127))


def scales(index: int) -> dict[str, torch.Tensor]:
    return {"low_scale": torch.tensor(HIGH * 2.0**-index), "high_scale": torch.tensor(HIGH)}


@pytest.mark.parametrize("bits", range(2, 9))
def test_equals_the_reference(bits: int) -> None:
    """The reference takes exponentials, torch divides probabilities by the largest: a code at a tie may flip."""
    high = 1 / (2 ** (bits - 1) - 1)
    low = np.array([high * 2.0 ** -(bits // 2)], np.float32)
    scores = np.random.default_rng(bits).normal(0, 3, (2, 3, 40, 50)).astype(np.float32)
    scores[..., :20] = -1e30  # masked
    numerators, reciprocals = multi_region_numerator(scores, low, bits, high)
    tensors = {"low_scale": torch.tensor(low[0]), "high_scale": torch.tensor(high)}
    p = SoftmaxNumerator.fake_quantize(torch.softmax(torch.from_numpy(scores), -1), bits, tensors).numpy()
    assert (np.abs(p - numerators * reciprocals) > 1e-6 * reciprocals).mean() <= 2e-4
    assert (p[..., :20] == 0).all()
    assert (p[..., 20:] > 0).any()


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    table = make_table(tiny_model(), Kind(groups=3, numerators=True))
    write_scale_table(tmp_path / "scales.safetensors", table)
    found = read_scale_table(tmp_path / "scales.safetensors")
    assert found == table
    assert type(found.by_module["blocks.0.attn.value_product"]["left"].quantizer) is SoftmaxNumerator


def test_a_low_scale_above_the_high_one_is_refused() -> None:
    table = make_table(tiny_model(), Kind(numerators=True))
    site = table.by_module["blocks.0.attn.value_product"]["left"]
    wrong = replace(site, quantizer=replace(site.quantizer, low_scale=np.ones((), np.float32)))
    with pytest.raises(FileFormatError, match=r"value_product\.left\.low_scale' is above its high scale"):
        replace(table, sites=(wrong,))


@pytest.mark.parametrize(("spread", "most", "least_of_probabilities"), [(1.0, 5e-4, 5e-2), (3.0, 5e-4, 3e-4)])
def test_32760_flat_tokens_keep_their_output(spread: float, most: float, least_of_probabilities: float) -> None:
    """Logits N(0, spread^2), eight queries at a time. Probabilities are 3e-5 on average, and no scale of two regions of
    probabilities is below 6e-5; a numerator relative to the largest is representable at any length."""
    tokens, generator = 32_760, torch.Generator().manual_seed(0)
    v = torch.randn(tokens, 16, generator=generator)
    errors = {SoftmaxNumerator: np.zeros(8), TwoRegionSoftmax: np.zeros(8)}
    energy = 0.0
    for _ in range(2):
        p = torch.softmax(spread * torch.randn(8, tokens, generator=generator), -1)
        energy += float((p @ v).square().sum())
        for scheme, found in errors.items():
            found += [float(((scheme.fake_quantize(p, 8, scales(i)) - p) @ v).square().sum()) for i in range(8)]
    assert errors[SoftmaxNumerator].min() < most * energy
    assert errors[TwoRegionSoftmax].min() > least_of_probabilities * energy
