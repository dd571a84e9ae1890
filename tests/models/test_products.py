"""What `find_products` makes of networks: explicit attention that computes the same, and each product's description."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from networks import WIDTH, Folded, Tokens, described
from support import tiny_model
from tables import Kind, make_table
from tqdit.models.products import Fold, Scores, ValueProduct, find_products
from tqdit.ports import Port

Q, KV = torch.Size([3, 4, 6, 8]), torch.Size([3, 4, 10, 8])


def float_mask() -> Tensor:
    return torch.randn(3, 1, 6, 10, generator=torch.Generator().manual_seed(5))


def bool_mask() -> Tensor:
    mask = torch.rand(6, 10, generator=torch.Generator().manual_seed(6)) < 0.6
    mask[:, 0] = True  # no row without a key
    return mask


ATTENTIONS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], torch.Size]] = {
    "plain": (F.scaled_dot_product_attention, KV),
    "scale": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.11), KV),
    "bool mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bool_mask()), KV),
    "float mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=float_mask()), KV),
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), KV),
    "causal, as many keys": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True), Q),
    "three dimensions": (
        lambda q, k, v: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], float_mask()[:, 0])[:, None], KV
    ),
    "five dimensions": (
        lambda q, k, v: F.scaled_dot_product_attention(
            *(x.unflatten(1, (2, 2)) for x in (q, k, v)), float_mask()[:, :, None]
        ).flatten(1, 2), KV,
    ),
    "grouped heads": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), torch.Size([3, 2, 10, 8])
    ),
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)


class Around(nn.Module):
    """Attention inside a network that may recompute it in the backward pass."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.recompute = Attention(attend), False

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.recompute:
            result: Tensor = checkpoint(self.inner, q, k, v, use_reentrant=False)
            return result
        return self.inner(q, k, v)


@pytest.mark.parametrize("name", list(ATTENTIONS))
def test_explicit_attention_computes_the_same_in_copies_and_recomputed(name: str) -> None:
    attend, shape = ATTENTIONS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = {key: torch.randn(size, generator=generator) for key, size in (("q", Q), ("k", shape), ("v", shape))}
    expected = attend(*inputs.values())
    network = Around(attend)
    products = find_products(network, inputs)
    assert [(p.name, p.place, p.made_by) for p in products] == [
        ("inner.sdpa.scores", "attention", None), ("inner.sdpa.value_product", "attention", "softmax")
    ]  # fmt: skip
    copied = copy.deepcopy(network)
    for each in (network, copied):
        calls: list[nn.Module] = []
        for module in each.modules():
            if isinstance(module, Scores | ValueProduct):
                module.register_forward_hook(lambda m, _i, _o, calls=calls: calls.append(m))
        torch.testing.assert_close(each(**inputs), expected, rtol=1e-6, atol=1e-6)
        assert len(calls) == 2  # through its own submodules, each once
    gradients = []
    for recompute in (False, True):
        copied.recompute = recompute
        leaves = {key: tensor.clone().requires_grad_() for key, tensor in inputs.items()}
        copied(**leaves).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves.values()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
    torch.testing.assert_close(
        attend(*inputs.values()), expected, rtol=0, atol=0
    )  # nothing outside of the module changed


def test_rows_of_a_mask_without_a_key_stay_finite() -> None:
    """A calibration needs finite operands."""
    mask = torch.zeros(6, 10, dtype=torch.bool)
    network = Around(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask))
    inputs = {key: torch.randn(size) for key, size in (("q", Q), ("k", KV), ("v", KV))}
    find_products(network, inputs)
    assert network(**inputs).isfinite().all()


class Zoo(nn.Module):
    """One of each: a patch convolution, conditioning, two attentions in one module, GELU with and without dropout, a
    layer that is called twice, one without effect, one that is never called, and a last layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.condition = nn.Conv2d(2, 8, 2, 2), nn.Linear(8, 8)
        self.qkv, self.inner, self.outer = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)
        self.gelu, self.dropout = nn.GELU(), nn.Dropout(0.1)
        self.dead, self.never, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.constant = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        h = self.patch(x).flatten(2).transpose(1, 2) + self.condition(t)[:, None]
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])
        h = F.scaled_dot_product_attention(h, k[:, None], v[:, None])[:, 0]
        self.dead(h)
        table = torch.zeros_like(self.constant.bias)[None].clone()
        table[:] = self.constant(self.last.weight[:1])
        h = h + table
        return (self.last(self.outer(self.dropout(self.gelu(self.inner(self.inner(h)))))),)


def zoo() -> tuple[Zoo, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Zoo().eval(), {"x": torch.randn(2, 2, 4, 4), "t": torch.randn(2, 8)}


def test_products_come_in_the_order_of_their_calls_with_what_makes_their_input() -> None:
    network, example = zoo()
    before = network(**example)[0]
    fold = Fold("condition", 0, 8)
    products = find_products(network, example, {"outer": (fold,)}, {"qkv": 3})
    assert [(p.name, p.place, p.made_by) for p in products] == [
        ("patch", "patch", None),
        ("condition", "conditioning", None),
        ("qkv", "block", None),
        ("sdpa.scores", "attention", None),
        ("sdpa.value_product", "attention", "softmax"),
        ("sdpa_1.scores", "attention", None),
        ("sdpa_1.value_product", "attention", "softmax"),
        ("inner", "block", None),
        ("outer", "block", "gelu"),
        ("last", "final", None),
    ]  # `dead` and `never` do not reach the prediction; `constant` takes no argument
    assert {p.name: p.folds for p in products if p.folds} == {"outer": (fold,), "last": (Fold("outer", 0, 8),)}
    assert {p.name: p.row_blocks for p in products if p.row_blocks > 1} == {"qkv": 3}
    torch.testing.assert_close(network(**example)[0], before, rtol=1e-6, atol=1e-6)


def test_a_network_keeps_its_parameters_and_names() -> None:
    network, example = zoo()
    before = dict(network.named_parameters())
    find_products(network, example)
    assert {name: id(p) for name, p in network.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert not any(p.grad is not None for p in before.values())


def test_looking_twice_finds_the_same() -> None:
    network, example = zoo()
    first = find_products(network, example)
    assert find_products(network, example) == first
    assert sum(isinstance(module, Scores) for module in network.modules()) == 2


def places(origin: str) -> dict[str, Any]:
    return {product.name: product for product in tiny_model(origin).products}


def test_products_of_the_native_dit() -> None:
    found = places("published")
    assert len(found) == 19
    assert found["x_embedder.proj"].place == "patch"
    assert found["final_layer.linear"].place == "final"
    assert found["blocks.1.mlp.fc2"].made_by == "gelu"
    assert found["blocks.1.attn.value_product"].made_by == "softmax"
    assert found["blocks.0.attn.qkv"].row_blocks == 3
    conditioning = {name for name, product in found.items() if product.place == "conditioning"}
    assert conditioning == {
        "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.adaLN_modulation.1",
        *(f"blocks.{i}.adaLN_modulation.1" for i in (0, 1)),
    }  # fmt: skip


def test_products_of_the_module_of_diffusers() -> None:
    found = places("diffusers")
    block = "transformer_blocks.{}"
    in_block = {
        "attn1.to_q": ("block", None), "attn1.to_k": ("block", None), "attn1.to_v": ("block", None),
        "attn1.sdpa.scores": ("attention", None), "attn1.sdpa.value_product": ("attention", "softmax"),
        "attn1.to_out.0": ("block", None), "ff.net.0.proj": ("block", None), "ff.net.2": ("block", "gelu"),
        "norm1.linear": ("conditioning", None),
        "norm1.emb.timestep_embedder.linear_1": ("conditioning", None),
        "norm1.emb.timestep_embedder.linear_2": ("conditioning", None),
    }  # fmt: skip
    expected = {f"{block.format(i)}.{name}": facts for i in (0, 1) for name, facts in in_block.items()}
    expected |= {
        "pos_embed.proj": ("patch", None), "proj_out_1": ("conditioning", None), "proj_out_2": ("final", None)
    }  # fmt: skip
    assert {name: (product.place, product.made_by) for name, product in found.items()} == expected
    equalised = {"attn1.to_out.0", "ff.net.0.proj"}
    assert {name for name, product in found.items() if product.folds} == {
        "proj_out_2", *(f"{block.format(i)}.{name}" for i in (0, 1) for name in equalised)
    }  # fmt: skip


def test_products_whose_first_axis_holds_more_than_rows_are_folded() -> None:
    model = described(Tokens(Folded()), (4, 6), Port("text", "request", "float32", (None, 5, 8)))
    assert {product.name for product in model.products if product.folded} == {
        "body.words", "body.narrow", "body.qkv", "body.sdpa.scores", "body.sdpa.value_product"
    }  # fmt: skip
    shapes = {}
    for product in model.products:
        if product.place == "attention":
            hook = lambda _m, inputs, _o, name=product.name: shapes.update({name: inputs[0].shape})  # noqa: E731
            model.network.get_submodule(product.name).register_forward_hook(hook)
    model.call({name: torch.from_numpy(array) for name, array in model.signature.zeros(3).items()})
    assert {name: (len(shape), shape[0]) for name, shape in shapes.items() if name.endswith("scores")} == {
        "body.sdpa.scores": (4, 6), "body.sdpa_1.scores": (4, 3), "body.sdpa_2.scores": (4, 3)
    }  # fmt: skip


class Parallel(nn.Module):
    """Attention and MLP side by side, their results joined in front of one linear layer: Flux's single blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up, self.gate = nn.Linear(8, 24), nn.Linear(8, 16), nn.Linear(8, 16)
        self.joined, self.gated = nn.Linear(24, 8), nn.Linear(24, 8, bias=False)
        self.streams, self.time, self.twice, self.out = (nn.Linear(16, 8) for _ in range(4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        activated, gated = F.gelu(self.up(x), approximate="tanh"), F.silu(self.gate(x)) * self.up(x)
        h = self.joined(torch.cat([attended, activated], dim=2)) + self.gated(torch.cat((gated, x), -1))
        h = h + self.streams(torch.cat([x, attended], dim=-1)) + self.time(torch.cat([t, F.gelu(t)], -1))[:, None]
        h = h + self.twice(torch.cat([h, F.gelu(h)], -1)) + self.twice(torch.cat([h, h], -1))
        return self.out(torch.cat([h, x], 1).unflatten(1, (2, -1)).transpose(1, 2).flatten(2))


def test_a_linear_layer_on_joined_columns_becomes_a_sum_over_its_parts() -> None:
    torch.manual_seed(0)
    network, example = Parallel().eval(), {"x": torch.randn(2, 5, 8), "t": torch.randn(2, 8)}
    expected, parameters = network(**example), sum(parameter.numel() for parameter in network.parameters())
    products = {product.name: (product.place, product.made_by) for product in find_products(network, example)}
    torch.testing.assert_close(network(**example), expected, rtol=1e-5, atol=1e-6)
    assert {name: facts for name, facts in products.items() if "columns" in name} == {
        "joined.columns.0": ("block", None), "joined.columns.1": ("block", "gelu"),
        "gated.columns.0": ("block", None), "gated.columns.1": ("block", None),
    }  # fmt: skip
    # parts that are made alike, one vector per row, calls that differ, tokens that are joined: as they were
    assert products.keys() >= {"streams", "time", "twice", "out"}
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert network.joined.columns[1].weight.shape == (8, 16)
    assert [part.bias is None for part in network.joined.columns] == [True, False]


def test_outputs_that_the_network_changes_in_place_are_observed_and_captured() -> None:
    class Edits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y[:, 0] += 1.0
            y.view(-1)[0] = 2.0
            return self.second(y)

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    model = described(Tokens(Edits()), (4, 6))
    assert {"body.first", "body.second"} <= {product.name for product in model.products}
    table = make_table(model, Kind())
    assert any(site.module == "body.second" for site in table.sites)
