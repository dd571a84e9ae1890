"""Equalised channels: the folded network computes the same, divides where it costs nothing, and is what is exported."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import support
from support import tiny_model
from tables import Kind, make_table
from tqdit.errors import UsageError
from tqdit.exporter.graph import ExportConfig
from tqdit.models.loaded import LoadedModel
from tqdit.models.products import ValueProduct
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.fold import fold, fold_divisors

EQUALISED = {
    "published": [
        *(f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.proj", "attn.qkv", "mlp.fc1")),
        "final_layer.linear",
    ],
    # q, k and v of diffusers' DiT have one input and would need one divisor
    "diffusers": [
        *(f"transformer_blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn1.to_out.0", "ff.net.0.proj")),
        "proj_out_2",
    ],
}
origins = pytest.mark.parametrize("origin", list(EQUALISED))


def rows(model: LoadedModel) -> dict[str, Tensor]:
    state, time, request = model.signature.names
    x = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return {state: x, time: torch.tensor([0, 250, 500, 750, 999]), request: torch.arange(5)}


def divisors_for(model: LoadedModel) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    width = {name: model.network.get_submodule(name).in_features for name in EQUALISED[model.origin]}
    return {name: torch.from_numpy(rng.uniform(0.2, 5, size).astype(np.float32)) for name, size in width.items()}


def operands_of(model: LoadedModel) -> dict[str, tuple[Tensor, ...]]:
    """Operands of every product on `rows`."""
    found: dict[str, tuple[Tensor, ...]] = {}
    hooks = [
        module.register_forward_hook(lambda _, operands, __, name=name: found.update({name: operands}))
        for name, module in model.network.named_modules()
        if isinstance(module, nn.Linear | ValueProduct)
    ]
    with torch.no_grad():
        model.call(rows(model))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.slow
@origins
def test_the_products_that_can_be_equalised_are_those_whose_input_is_linear_in_a_weight(origin: str) -> None:
    model = tiny_model(origin)
    assert sorted(product.name for product in model.products if product.folds) == sorted(EQUALISED[origin])


@pytest.mark.slow
@origins
def test_the_folded_network_computes_the_same(origin: str) -> None:
    model = tiny_model(origin)
    inputs = rows(model)
    with torch.no_grad():
        before = model.call(inputs)
        folded = fold_divisors(model, divisors_for(model)).call(inputs)
        after = model.call(inputs)
    torch.testing.assert_close(folded, before, rtol=1e-4, atol=1e-5)  # other roundings of float32
    assert not torch.equal(folded, before)
    torch.testing.assert_close(after, before, rtol=0, atol=0)  # the float model is not touched


@origins
def test_inputs_come_divided_and_weights_are_multiplied(origin: str) -> None:
    model = tiny_model(origin)
    divisors = divisors_for(model)
    folded = fold_divisors(model, divisors)
    for name in EQUALISED[origin]:
        if not name.endswith("qkv"):  # whose rows of v are divided as well
            weight = model.network.get_submodule(name).weight * divisors[name]
            torch.testing.assert_close(folded.network.get_submodule(name).weight, weight, rtol=0, atol=0)
    before, after = operands_of(model), operands_of(folded)
    for name, divisor in divisors.items():
        torch.testing.assert_close(after[name][0], before[name][0] / divisor, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("origin", "linear", "product"),
    [
        ("published", "blocks.1.attn.proj", "blocks.1.attn.value_product"),
        ("diffusers", "transformer_blocks.1.attn1.to_out.0", "transformer_blocks.1.attn1.sdpa.value_product"),
    ],
)
def test_the_divisors_after_attention_reach_v_head_by_head(origin: str, linear: str, product: str) -> None:
    model = tiny_model(origin)
    divisors = {linear: divisors_for(model)[linear]}
    before, after = operands_of(model)[product][1], operands_of(fold_divisors(model, divisors))[product][1]
    heads, size = before.shape[1], before.shape[3]
    torch.testing.assert_close(after, before / divisors[linear].reshape(heads, 1, size), rtol=1e-5, atol=1e-6)


def test_layers_without_bias_get_one_only_if_something_is_added() -> None:
    """adaLN's scale computes 1 + W c: divided, the 1 has to become 1 / d. A row of v has nothing added."""
    model = tiny_model()
    for name in ("blocks.0.adaLN_modulation.1", "blocks.0.attn.qkv"):
        model.network.get_submodule(name).bias = None
    divisors = {name: divisors_for(model)[name] for name in ("blocks.0.attn.proj", "blocks.0.mlp.fc1")}
    folded = fold_divisors(model, divisors)
    assert folded.network.get_submodule("blocks.0.attn.qkv").bias is None
    with torch.no_grad():
        torch.testing.assert_close(folded.call(rows(model)), model.call(rows(model)), rtol=1e-4, atol=1e-5)


def test_layers_that_nothing_divides_share_their_weights() -> None:
    model = tiny_model()
    folded = fold_divisors(model, divisors_for(model))
    for name in ("blocks.0.mlp.fc2.weight", "x_embedder.proj.weight", "t_embedder.mlp.0.weight", "pos_embed"):
        assert folded.network.get_parameter(name) is model.network.get_parameter(name)
    assert fold_divisors(model, {}) is model


@pytest.mark.slow
@origins
def test_a_table_with_divisors_is_one_without_for_the_folded_network(origin: str) -> None:
    model = tiny_model(origin)
    table = make_table(model, Kind(groups=3, everywhere=True, asymmetric=True, equalised=True))
    assert sum(site.divisor is not None for site in table.sites) == len(EQUALISED[origin])
    folded, plain = fold(model, table)
    assert all(site.divisor is None for site in plain.sites)
    inputs = rows(model)
    with torch.no_grad():
        torch.testing.assert_close(apply(model, table).call(inputs), apply(folded, plain).call(inputs), rtol=0, atol=0)


@pytest.mark.slow
def test_equalisation_adds_no_node_to_the_exported_graph() -> None:
    config = ExportConfig("denoiser", attention="integer")
    model = tiny_model()
    graphs = [
        support.exported(config, table=make_table(model, Kind(groups=3, equalised=equalised)))[0]
        for equalised in (False, True)
    ]
    plain, equalised = (sorted(node.op_type for node in graph.graph) for graph in graphs)
    assert equalised == plain


def test_a_divisor_without_a_place_is_refused_by_name() -> None:
    model = tiny_model()
    for name in ("blocks.0.mlp.fc2", "no.such"):
        with pytest.raises(UsageError, match=f"'{name}.divisor'.*no place"):
            fold_divisors(model, {name: torch.ones(64)})
    with pytest.raises(UsageError, match=r"'blocks.0.attn.qkv.divisor' has shape \(3,\), its layer has 16 inputs"):
        fold_divisors(model, {"blocks.0.attn.qkv": torch.ones(3)})
