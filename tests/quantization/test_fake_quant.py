"""The fake-quantized network against NumPy, row by row, and its way of choosing the group."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support import tiny_model
from tqdit.errors import UsageError
from tqdit.models.loaded import LoadedModel, PositionalCall
from tqdit.models.products import Scores, ValueProduct
from tqdit.plugins.multi_region_numerator.reference import multi_region_numerator
from tqdit.quantization.fake_quant import QuantizedNetwork, RowGroups, apply, quantize_module
from tqdit.quantization.granularity import PerChannel, PerTensor, PerTimestepGroup
from tqdit.quantization.schemes.asymmetric import Asymmetric
from tqdit.quantization.schemes.softmax_numerator import SoftmaxNumerator
from tqdit.quantization.schemes.symmetric import Symmetric
from tqdit.quantization.schemes.two_region_gelu import TwoRegionGelu
from tqdit.quantization.schemes.two_region_softmax import TwoRegionSoftmax
from tqdit.quantization.table import ScaleTable, Site, even_boundaries

PER_GROUP = PerTimestepGroup(3)
GROUPS = torch.tensor([2, 0, 1, 1])


def f32(*values: float) -> Any:
    return np.array(values if len(values) > 1 else values[0], dtype=np.float32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def run(module: nn.Module, sites: dict[str, Site], *inputs: Tensor) -> np.ndarray:
    rows = RowGroups()
    quantized = quantize_module("m", module, sites, rows)
    with rows.set(GROUPS), torch.no_grad():
        return quantized(*inputs).numpy()


def q_dq(x: np.ndarray, s: Any, bits: int) -> np.ndarray:
    q = 2 ** (bits - 1)
    return s * np.clip(np.rint(x / s), -q, q - 1)


def linear() -> tuple[nn.Linear, Site, np.ndarray, np.ndarray]:
    """A layer, the site of its weight, and W^ and the bias in NumPy."""
    module = nn.Linear(8, 5).requires_grad_(False)
    module.weight.copy_(random(5, 8, seed=1))
    scale = np.linspace(0.05, 0.1, 5, dtype=np.float32)
    site = Site("m", "weight", Symmetric(4, PerChannel(0), scale))
    return module, site, q_dq(module.weight.numpy(), scale[:, None], 4), module.bias.numpy()


def test_symmetric_groups_divide_before_and_multiply_after() -> None:
    module, weight, w, bias = linear()
    s = f32(0.1, 0.4, 0.2)
    x = random(4, 6, 8)
    y = run(module, {"weight": weight, "input": Site("m", "input", Symmetric(6, PER_GROUP, s))}, x)
    for row, group in enumerate(GROUPS.tolist()):
        expected = q_dq(x[row].numpy(), s[group], 6) @ w.T + bias
        np.testing.assert_allclose(y[row], expected, rtol=1e-5, atol=1e-5)


def test_asymmetric_groups_equal_equation_5() -> None:
    module, weight, w, bias = linear()
    s, o = f32(0.03, 0.04, 0.02), np.array([100, 3, 255], dtype=np.int32)
    x = random(4, 6, 8) + 1
    y = run(module, {"weight": weight, "input": Site("m", "input", Asymmetric(8, PER_GROUP, s, o))}, x)
    for row, group in enumerate(GROUPS.tolist()):
        codes = np.clip(np.rint(x[row].numpy() / s[group]) + o[group], 0, 255) - o[group]
        np.testing.assert_allclose(y[row], (s[group] * codes) @ w.T + bias, rtol=1e-4, atol=1e-4)


def test_gelu_regions_are_two_products_with_one_weight() -> None:
    module, weight, w, bias = linear()
    low, high = f32(0.01, 0.02, 0.03), f32(0.1, 0.2, 0.3)
    x = torch.nn.functional.gelu(random(4, 6, 8), approximate="tanh")
    y = run(module, {"weight": weight, "input": Site("m", "input", TwoRegionGelu(5, PER_GROUP, low, high))}, x)
    for row, group in enumerate(GROUPS.tolist()):
        v = x[row].numpy()
        v = np.where(v < 0, q_dq(v, low[group], 5), q_dq(v, high[group], 5))
        np.testing.assert_allclose(y[row], v @ w.T + bias, rtol=1e-5, atol=1e-5)


def test_scores_multiply_the_ratios_of_both_operands() -> None:
    q, k = random(4, 2, 6, 3), random(4, 2, 6, 3, seed=1)
    sq, sk = f32(0.1, 0.2, 0.3), f32(0.05, 0.04, 0.03)
    sites = {"left": Site("m", "left", Symmetric(8, PER_GROUP, sq)),
             "right": Site("m", "right", Symmetric(8, PER_GROUP, sk))}  # fmt: skip
    y = run(Scores(), sites, q, k)
    for row, group in enumerate(GROUPS.tolist()):
        a, b = q_dq(q[row].numpy(), sq[group], 8), q_dq(k[row].numpy(), sk[group], 8)
        np.testing.assert_allclose(y[row], a @ b.transpose(0, 2, 1) / np.sqrt(np.float32(3)), rtol=1e-5, atol=1e-5)


def test_value_product_takes_the_low_scale_of_each_row() -> None:
    p, v = torch.softmax(3 * random(4, 2, 6, 6), -1), random(4, 2, 6, 3, seed=1)
    low, high = f32(1 / 31 / 8, 1 / 31 / 4, 1 / 31), f32(1 / 31)
    sites = {"left": Site("m", "left", TwoRegionSoftmax(6, PER_GROUP, low, high)),
             "right": Site("m", "right", Symmetric(6, PerTensor(), f32(0.1)))}  # fmt: skip
    y = run(ValueProduct(), sites, p, v)
    for row, group in enumerate(GROUPS.tolist()):
        x = p[row].numpy()
        is_low = np.rint(x / low[group]) <= 31
        x = np.where(is_low, low[group] * np.rint(x / low[group]), high * np.clip(np.rint(x / high), 0, 31))
        np.testing.assert_allclose(y[row], x @ q_dq(v[row].numpy(), f32(0.1), 6), rtol=1e-5, atol=1e-5)


def test_numerators_are_divided_behind_the_product_and_take_the_low_scale_of_each_row() -> None:
    scores, v = 3 * random(4, 2, 6, 6), random(4, 2, 6, 3, seed=1)
    low, high = f32(1 / 31 / 8, 1 / 31 / 4, 1 / 31), f32(1 / 31)
    sites = {"left": Site("m", "left", SoftmaxNumerator(6, PER_GROUP, low, high)),
             "right": Site("m", "right", Symmetric(8, PerTensor(), f32(0.05)))}  # fmt: skip
    y = run(ValueProduct(), sites, torch.softmax(scores, -1), v)
    numerators, reciprocals = multi_region_numerator(scores.numpy(), low[GROUPS.numpy()], 6, float(high))
    np.testing.assert_allclose(y, (numerators @ q_dq(v.numpy(), f32(0.05), 8)) * reciprocals, rtol=1e-5, atol=1e-5)


def test_a_patch_convolution_is_quantized_like_a_linear_layer() -> None:
    conv = nn.Conv2d(3, 5, 2, stride=2).requires_grad_(False)
    s, o = f32(0.03, 0.04, 0.02), np.array([100, 90, 128], dtype=np.int32)
    sites = {"weight": Site("m", "weight", Symmetric(8, PerChannel(0), np.full(5, 0.003, dtype=np.float32))),
             "input": Site("m", "input", Asymmetric(8, PER_GROUP, s, o))}  # fmt: skip
    x = random(4, 3, 4, 4)
    as_linear = nn.Linear(12, 5).requires_grad_(False)
    as_linear.weight.copy_(conv.weight.flatten(1))
    as_linear.bias.copy_(conv.bias)
    patches = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
    y = run(conv, sites, x).reshape(4, 5, 4).transpose(0, 2, 1)
    np.testing.assert_allclose(y, run(as_linear, sites, patches), rtol=1e-4, atol=1e-5)


def test_stored_codes_replace_rounding_to_nearest() -> None:
    module, weight, _, bias = linear()
    codes = np.random.default_rng(0).integers(-8, 8, (5, 8)).astype(np.int8)
    y = run(module, {"weight": replace(weight, codes=codes)}, torch.eye(8))
    scale = np.linspace(0.05, 0.1, 5, dtype=np.float32)
    np.testing.assert_allclose(y, (codes * scale[:, None]).T + bias, rtol=1e-6)


def table_for(model: LoadedModel, boundaries: np.ndarray | None = None) -> ScaleTable:
    """Every layer of block 0, with scales that differ much between three groups."""
    sites = []
    for name, width in (("attn.qkv", 48), ("attn.proj", 16), ("mlp.fc1", 64), ("mlp.fc2", 16)):
        weight = Symmetric(8, PerChannel(0), np.full(width, 0.01, dtype=np.float32))
        sites.append(Site(f"blocks.0.{name}", "weight", weight))
        sites.append(Site(f"blocks.0.{name}", "input", Symmetric(8, PER_GROUP, f32(0.02, 0.1, 0.5))))
    sites.append(Site("blocks.0.attn.scores", "left", Symmetric(8, PER_GROUP, f32(0.02, 0.1, 0.5))))
    sites.append(Site("blocks.0.attn.scores", "right", Symmetric(8, PER_GROUP, f32(0.02, 0.1, 0.5))))
    softmax = TwoRegionSoftmax(8, PER_GROUP, f32(1 / 127 / 64, 1 / 127 / 8, 1 / 127), f32(1 / 127))
    sites.append(Site("blocks.0.attn.value_product", "left", softmax))
    sites.append(Site("blocks.0.attn.value_product", "right", Symmetric(8, PerTensor(), f32(0.05))))
    return ScaleTable(
        model=model.source, fingerprint=model.fingerprint, sites=tuple(sites), seed=0, guidance_scale=1.5,
        boundaries=even_boundaries(3) if boundaries is None else boundaries,
    )  # fmt: skip


def inputs(timestep: list[int]) -> dict[str, Tensor]:
    rows = len(timestep)
    return {"x": random(rows, 4, 8, 8), "timestep": torch.tensor(timestep), "class_labels": torch.arange(rows) % 6}


def test_each_row_takes_the_group_of_its_own_timestep() -> None:
    model = tiny_model()
    quantized = apply(model, table_for(model)).network
    batch = inputs([0, 333, 334, 667, 999])
    with torch.no_grad():
        together = quantized(**batch)
        alone = [quantized(**{name: values[i : i + 1] for name, values in batch.items()}) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_timestep_on_a_boundary_uses_the_later_scale() -> None:
    model = tiny_model()
    batch = inputs([400])
    with torch.no_grad():
        at, before, last = (
            apply(model, table_for(model, np.array(boundaries))).call(batch)
            for boundaries in ([300.0, 400.0], [300.0, 401.0], [10.0, 20.0])
        )
    torch.testing.assert_close(at, last, rtol=0, atol=0)
    assert (at - before).abs().max() > 1e-3


def test_the_float_model_is_not_touched_and_its_other_weights_are_shared() -> None:
    model = tiny_model()
    batch = inputs([5, 600])
    before = model.call(batch)
    quantized = apply(model, table_for(model)).network
    assert isinstance(quantized, QuantizedNetwork)
    name = "blocks.1.attn.qkv.weight"
    assert quantized.network.get_parameter(name) is model.network.get_parameter(name)
    assert (quantized(**batch) - before).abs().max() > 1e-4
    torch.testing.assert_close(model.call(batch), before, rtol=0, atol=0)


@pytest.mark.slow
def test_threads_do_not_see_each_others_groups() -> None:
    model = tiny_model()
    quantized = apply(model, table_for(model)).network
    batches = [inputs([step]) for step in (0, 400, 999) * 4]
    with torch.no_grad():
        expected = [quantized(**batch) for batch in batches]

        def work(batch: dict[str, Tensor]) -> Tensor:
            with torch.no_grad():
                return quantized(**batch)

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(work, batches))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_quantized_model_can_be_copied_and_pickled() -> None:
    model = tiny_model()
    quantized = apply(model, table_for(model)).network
    batch = inputs([0, 500])
    expected = quantized(**batch)
    for copied in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        torch.testing.assert_close(copied(**batch), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_the_quantized_network_can_be_traced() -> None:
    model = tiny_model()
    applied = apply(model, table_for(model))
    quantized, whole = applied.network, PositionalCall(applied)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = (({0: batch},) * 3,)
    program = torch.export.export(whole, tuple(inputs([1, 500, 900]).values()), dynamic_shapes=shapes, strict=False)
    other = inputs([0, 400, 800, 999])
    torch.testing.assert_close(program.module()(*other.values()), quantized(**other), rtol=1e-4, atol=1e-4)


def test_a_table_that_does_not_fit_is_refused_by_name() -> None:
    model = tiny_model()
    table = table_for(model)

    def with_site(module: str, role: Any, channels: int = 0) -> ScaleTable:
        granularity = PerChannel(0) if channels else PerTensor()
        scale = np.ones(channels, dtype=np.float32) if channels else f32(1)
        return replace(table, sites=(Site(module, role, Symmetric(8, granularity, scale)),))

    with pytest.raises(UsageError, match="calibrated for model 'tiny'"):
        apply(replace(model, fingerprint="0" * 64), table)
    with pytest.raises(UsageError, match=r"names 'blocks.9.attn.qkv'"):
        apply(model, with_site("blocks.9.attn.qkv", "weight"))
    with pytest.raises(UsageError, match=r"'left'.* of 'blocks.0.attn.qkv', a Linear"):
        apply(model, with_site("blocks.0.attn.qkv", "left"))
    with pytest.raises(UsageError, match=r"of 'blocks.0.norm1', a LayerNorm"):
        apply(model, with_site("blocks.0.norm1", "input"))
    with pytest.raises(UsageError, match=r"only \['left'\] of the product"):
        apply(model, with_site("blocks.0.attn.scores", "left"))
    with pytest.raises(UsageError, match="has 7 scales"):
        apply(model, with_site("blocks.0.attn.qkv", "weight", channels=7))
