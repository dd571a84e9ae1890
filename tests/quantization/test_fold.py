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
from tqdit.quantization.fold import fold, fold_divisors, source_of

EQUALISED = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.proj", "attn.qkv", "mlp.fc1")]
EQUALISED += ["final_layer.linear"]


def rows() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0, 250, 500, 750, 999]), torch.arange(5)


def divisors_for(model: LoadedModel) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    width = {name: model.network.get_submodule(name).in_features for name in EQUALISED}
    return {name: torch.from_numpy(rng.uniform(0.2, 5, size).astype(np.float32)) for name, size in width.items()}


def operands_of(network: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """Operands of every product on `rows`."""
    found: dict[str, tuple[Tensor, ...]] = {}
    hooks = [
        module.register_forward_hook(lambda _, operands, __, name=name: found.update({name: operands}))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | ValueProduct)
    ]
    with torch.no_grad():
        network(*rows())
    for hook in hooks:
        hook.remove()
    return found


def test_the_layers_that_can_be_equalised_are_those_whose_input_is_linear_in_a_weight() -> None:
    network = tiny_model().network
    assert sorted(name for name, _ in network.named_modules() if source_of(network, name)) == sorted(EQUALISED)


@pytest.mark.parametrize("origin", ["published", "diffusers"])
def test_the_folded_network_computes_the_same(origin: str) -> None:
    model = tiny_model(origin)
    with torch.no_grad():
        before = model.network(*rows())
        folded = fold_divisors(model.network, divisors_for(model))(*rows())
        after = model.network(*rows())
    torch.testing.assert_close(folded, before, rtol=1e-4, atol=1e-5)  # other roundings of float32
    assert not torch.equal(folded, before)
    torch.testing.assert_close(after, before, rtol=0, atol=0)  # the float model is not touched


def test_inputs_come_divided_and_weights_are_multiplied() -> None:
    model = tiny_model()
    divisors = divisors_for(model)
    network = fold_divisors(model.network, divisors)
    for name in EQUALISED:
        if not name.endswith("qkv"):  # whose rows of v are divided as well
            weight = model.network.get_submodule(name).weight * divisors[name]
            torch.testing.assert_close(network.get_submodule(name).weight, weight, rtol=0, atol=0)
    before, after = operands_of(model.network), operands_of(network)
    for name, divisor in divisors.items():
        torch.testing.assert_close(after[name][0], before[name][0] / divisor, rtol=1e-4, atol=1e-4)


def test_the_divisors_of_proj_reach_v_head_by_head() -> None:
    model = tiny_model()
    divisors = {"blocks.1.attn.proj": divisors_for(model)["blocks.1.attn.proj"]}
    before, after = operands_of(model.network), operands_of(fold_divisors(model.network, divisors))
    name = "blocks.1.attn.value_product"
    heads, size = before[name][1].shape[1], before[name][1].shape[3]
    divisor = divisors["blocks.1.attn.proj"].reshape(heads, 1, size)
    torch.testing.assert_close(after[name][1], before[name][1] / divisor, rtol=1e-5, atol=1e-6)


def test_layers_that_nothing_divides_share_their_weights() -> None:
    model = tiny_model()
    network = fold_divisors(model.network, divisors_for(model))
    for name in ("blocks.0.mlp.fc2.weight", "x_embedder.proj.weight", "t_embedder.mlp.0.weight", "pos_embed"):
        assert network.get_parameter(name) is model.network.get_parameter(name)
    assert fold_divisors(model.network, {}) is model.network


def test_a_table_with_divisors_is_one_without_for_the_folded_network() -> None:
    model = tiny_model()
    table = make_table(model, Kind(groups=3, everywhere=True, asymmetric=True, equalised=True))
    folded, plain = fold(model, table)
    assert all(site.divisor is None for site in plain.sites)
    with torch.no_grad():
        torch.testing.assert_close(
            apply(model, table).network(*rows()), apply(folded, plain).network(*rows()), rtol=0, atol=0
        )


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
    network = tiny_model().network
    with pytest.raises(UsageError, match=r"divides the input of 'blocks.0.mlp.fc2', which nothing before it can do"):
        fold_divisors(network, {"blocks.0.mlp.fc2": torch.ones(64)})
    with pytest.raises(UsageError, match=r"divides the input of 'no.such'"):
        fold_divisors(network, {"no.such": torch.ones(64)})
    with pytest.raises(UsageError, match=r"'blocks.0.attn.qkv.input.divisor' has 3 entries"):
        fold_divisors(network, {"blocks.0.attn.qkv": torch.ones(3)})
